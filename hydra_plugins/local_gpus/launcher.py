"""``hydra/launcher=local_gpus``: every job of a multirun in a fresh interpreter, on a device slot from a queue.

Hydra's basic launcher runs jobs one after another in one interpreter, where an engine and its GPU memory outlive
their job. Here a job is the same command with the job's own overrides and run directory; its output goes to a log
beside that: ``0.log`` beside ``0``.
"""

# No postponed annotations here: Hydra's scanner runs a module before it is in sys.modules, where dataclasses look.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from hydra_plugins.local_gpus.command import job_command
from hydra_plugins.local_gpus.jobs import Job, run_jobs
from hydra_plugins.local_gpus.slots import device_slots


@dataclass
class LocalGpusConf:
    """``slots``: jobs at once. None: as many as the visible GPUs can hold, 1 where there is no GPU."""

    _target_: str = "hydra_plugins.local_gpus.launcher.LocalGpusLauncher"
    slots: int | None = None
    gpus_per_job: int = 1
    job_timeout_s: float | None = None  # None: a job may run for as long as it likes


ConfigStore.instance().store(group="hydra/launcher", name="local_gpus", node=LocalGpusConf, provider="local_gpus")


class SweepFailed(CompactHydraException):
    """Some jobs of a sweep failed; each was reported when it ended."""


class LocalGpusLauncher(Launcher):
    def __init__(self, slots: int | None, gpus_per_job: int, job_timeout_s: float | None) -> None:
        self.slots = slots
        self.gpus_per_job = gpus_per_job
        self.job_timeout_s = job_timeout_s
        self.config: DictConfig
        self.hydra_context: HydraContext

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; the result has one entry per job, in the order given. Raises ``SweepFailed`` if one failed.

        Before that the callbacks hear of the sweep's end, with the run directories of those that ``failed``.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        slots = device_slots(self.slots, self.gpus_per_job)
        returns, jobs = [], []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._job_config(number, list(overrides))
            folder = Path(config.hydra.runtime.output_dir)
            label = f"#{number} {' '.join(filter_overrides(overrides))}".strip()
            jobs.append(Job(label, job_command(config, list(overrides)), folder))
            returns.append(_job_return(config))
        run_jobs(jobs, slots, timeout_s=self.job_timeout_s)
        failed = [job for job in jobs if job.problem]
        if failed:
            # Hydra itself would not call them, and what the other jobs came to would stay untold.
            self.hydra_context.callbacks.on_multirun_end(
                config=self.config,
                config_name=self.config.hydra.job.config_name,
                failed=[job.folder for job in failed],
            )
            text = "; ".join(f"{job.label}: {job.problem} (log: {job.log})" for job in failed)
            raise SweepFailed(f"{len(failed)} of {len(jobs)} jobs failed: {text}")
        for job, job_return in zip(jobs, returns, strict=True):
            job_return.return_value = job.value
            job_return.status = JobStatus.COMPLETED
        return returns

    def _job_config(self, number: int, overrides: list[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with read_write(config), open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # the sub-directory may name the job's number and overrides
        folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder.absolute())
        return config


def _job_return(config: DictConfig) -> JobReturn:
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    hydra = OmegaConf.masked_copy(config, ["hydra"])
    return JobReturn(
        overrides=list(config.hydra.overrides.task),
        cfg=own,
        hydra_cfg=hydra,
        working_dir=config.hydra.runtime.output_dir if config.hydra.job.chdir else str(Path.cwd()),
        task_name=Singleton.instance(JobRuntime).get("name"),
    )
