"""What a sweep of training runs comes to: one table, one plot of accuracies, one Pareto plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from training.dotted_names import dotted


class Combine(Callback):
    """At the end of a sweep: the last evaluation of each run, and the first of all, in ``evaluation.json``.

    The runs whose directories the launcher calls ``failed`` are left out: they were not trained to their end.
    """

    def on_multirun_end(self, config: DictConfig, failed: Sequence[Path] = (), **kwargs: Any) -> None:
        from rollout.evaluate import show

        directory = Path(config.hydra.sweep.dir)
        ended = (path for path in directory.glob("*/stages.json") if path.parent.absolute() not in failed)
        jobs = sorted(ended, key=lambda path: int(path.parent.name))
        evaluations = [json.loads(path.read_text())["evaluations"] for path in jobs]
        found = [(path.parent, made) for path, made in zip(jobs, evaluations, strict=True) if made]
        if not found:
            return
        settings = [dotted(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))) for folder, _ in found]
        records = [
            {"name": name, "checkpoint": str(folder / "checkpoints"), **made[-1]}
            for name, (folder, made) in zip(names(settings), found, strict=True)
        ]
        start = found[0][1][0]
        if start["step"] == 0:
            records.insert(0, {"name": "before training", **start})
        (directory / "evaluation.json").write_text(json.dumps(records, indent=1))
        show(records, directory)


def names(settings: list[dict[str, Any]]) -> list[str]:
    """What tells the runs apart: the settings that are not the same in all of them, but for where they write."""
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in ("run_dir", "name")]
    differ = [key for key in keys if len({json.dumps(each.get(key)) for each in settings}) > 1]
    return [
        ", ".join(f"{key}={each[key]}" for key in differ if key in each) or str(i) for i, each in enumerate(settings)
    ]
