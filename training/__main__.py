"""python -m training: compose, check, run."""

from __future__ import annotations

import os
import signal
import sys
import time

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from rollout.display import console
from rollout.errors import UserError
from rollout.hydra import conf_dir, guarded, run_command, run_dir, to_object
from training import config

START = time.monotonic()  # imports count in what a run takes

config.register()


def rank_of_environment() -> int:
    """The rank that torchrun or ``accelerate launch`` gave this process."""
    return int(os.environ.get("RANK", "0"))


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="training")
@guarded
def run(composed: DictConfig) -> float | None:
    """One training run; gives the accuracy after it, which is what sweepers and launchers read."""
    cfg: config.TrainingConfig = to_object(composed)
    cfg.check()
    if HydraConfig.get().mode == RunMode.MULTIRUN and "WORLD_SIZE" in os.environ:
        raise UserError("--multirun starts runs of one process each; give each run of several a torchrun of its own")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and getattr(cfg.engine, "mode", "") == "in_process":
        raise UserError("engine: lives in the trainer's process, of which there are several; take engine=vllm_process")
    for note in cfg.notes():
        if rank_of_environment() == 0:
            console.print(f"note: {note}", highlight=False)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if cfg.threads is not None:  # before torch reads it
        os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
    if cfg.dry_run:
        from training.dry_run import dry_run

        if rank_of_environment() == 0:
            dry_run(cfg)
        return None
    if (cfg.trainer.get("fsdp") or cfg.trainer.get("deepspeed")) and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "sharding: needs a launcher, for one process too; torchrun --standalone --nproc-per-node N -m training …"
        )
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on the terminal that it chose so
    from training.run import execute

    return execute(cfg, composed, run_dir(), START).get("accuracy_after")


def _interrupt(number: int, frame: object) -> None:
    """As Ctrl-C: a launcher that ends its processes must not leave their engines behind."""
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    if rank_of_environment() > 0:
        sys.argv.append("hydra.run.dir=.")  # the run's directory is rank 0's to make
    run_command(run)


if __name__ == "__main__":
    main()
