"""What each replica of a served checkpoint has of its own: folder, log, the scheduler's files and ports."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from rollout.config import SchedulerConfig
from rollout.scheduling.files import for_replica, with_files
from serving.config import ServingConfig, flag


@dataclass(frozen=True)
class Plan:
    """``variables`` go into the environment of the replica's server, and name the files that ``scheduler`` has."""

    replica: int
    folder: Path
    scheduler: SchedulerConfig
    variables: dict[str, str]

    @property
    def log(self) -> Path:
        return self.folder / "engine.log"


def plan(config: ServingConfig, checkpoint: Path, run_dir: Path, replica: int) -> Plan:
    """One server's part; alone it has ``run_dir`` to itself, else ``run_dir/replica-N``."""
    folder = run_dir if config.replicas == 1 else run_dir / f"replica-{replica}"
    folder.mkdir(parents=True, exist_ok=True)
    if config.scheduler.policy is None:
        return Plan(replica, folder, config.scheduler, {})
    engines = int(next((size for key, size in config.extra.items() if flag(key) == "data-parallel-size"), 1))
    own = for_replica(config.scheduler.options, replica, engines)
    options, variables = with_files(own, checkpoint=checkpoint, run_dir=folder)
    return Plan(replica, folder, dataclasses.replace(config.scheduler, options=options), variables)
