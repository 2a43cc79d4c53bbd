"""Where the plug-in's files lie: tool latencies beside a checkpoint, the scheduler's numbers in a run's directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.scheduling.options import KEY

LATENCIES = "tool_latencies.json"
NUMBERS = "turnstile.json"


def with_files(
    options: Mapping[str, Any], *, checkpoint: Path, run_dir: Path, save: bool = False, resumed: bool = False
) -> dict[str, Any]:
    """``scheduler.options`` with the files that the user did not name.

    Args:
        options: of a policy of ours, under ``KEY``.
        checkpoint: what the engine starts from; the tool latencies that lie there are loaded.
        run_dir: the scheduler's numbers go there.
        save: the tool latencies go there too.
        resumed: the checkpoint's latencies hold those that the user named when the run began.
    """
    own = {name: value for name, value in options[KEY].items() if value is not None}
    known = checkpoint / LATENCIES
    if known.is_file() and (resumed or "latencies" not in own):
        own["latencies"] = str(known.resolve())
    own.setdefault("metrics_path", str((run_dir / NUMBERS).resolve()))
    if save:
        own["save_latencies"] = str((run_dir / LATENCIES).resolve())
    return {**options, KEY: own}
