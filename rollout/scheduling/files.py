"""Where the plug-in's files lie: tool latencies beside a checkpoint, the scheduler's numbers in a run's directory.

Their paths change with every run, and vLLM counts ``additional_config`` among what its compiled graphs depend on
(``VllmConfig.compute_hash``): with the paths in it every start would compile anew. So the options name environment
variables, the same in every run, and the engine's process finds the paths in its environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.scheduling.metrics import engine_path
from rollout.scheduling.options import KEY

LATENCIES = "tool_latencies.json"
NUMBERS = "turnstile.json"
VARIABLES = {  # by option
    "latencies": "TURNSTILE_LATENCIES",
    "save_latencies": "TURNSTILE_SAVE_LATENCIES",
    "metrics_path": "TURNSTILE_METRICS",
}


def with_files(
    options: Mapping[str, Any], *, checkpoint: Path, run_dir: Path, save: bool = False, resumed: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """``scheduler.options`` with the files, the user's or ours, and the environment that the engine needs for them.

    The variable of a file that there is not is empty.

    Args:
        options: of a policy of ours, under ``KEY``.
        checkpoint: what the engine starts from; the tool latencies that lie there are loaded.
        run_dir: the scheduler's numbers go there.
        save: the tool latencies go there too.
        resumed: the checkpoint's latencies hold those that the user named when the run began.
    """
    own = {name: value for name, value in options[KEY].items() if value is not None}
    files = {name: os.path.expandvars(own[name]) for name in VARIABLES if name in own}
    known = checkpoint / LATENCIES
    if known.is_file() and (resumed or "latencies" not in files):
        files["latencies"] = str(known.resolve())
    files.setdefault("metrics_path", str((run_dir / NUMBERS).resolve()))
    if save:
        files["save_latencies"] = str((run_dir / LATENCIES).resolve())
    named = own | {name: f"${variable}" for name, variable in VARIABLES.items()}
    return {**options, KEY: named}, {variable: files.get(name, "") for name, variable in VARIABLES.items()}


def for_replica(options: Mapping[str, Any], replica: int, engines: int = 1) -> dict[str, Any]:
    """The options of the server with that number among several: what it writes is not what another one writes.

    Number 0 has the names as they are given, number 1 ``stats.1.json`` for ``stats.json``.
    """
    own = dict(options[KEY])
    for name in ("save_latencies", "metrics_path"):
        if own.get(name) is not None:
            own[name] = str(engine_path(Path(own[name]), replica))
    return with_own_port({**options, KEY: own}, replica, engines)


def with_own_port(options: Mapping[str, Any], replica: int, engines: int = 1) -> dict[str, Any]:
    """The options, with the port of the server's metrics after those of the ``engines`` that each one before it has."""
    own = dict(options.get(KEY, {}))
    if not own.get("metrics_port"):
        return dict(options)
    own["metrics_port"] += replica * engines
    return {**options, KEY: own}
