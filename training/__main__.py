"""python -m training: compose, check, build, run."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from rollout.hydra import conf_dir, guarded, run_command, to_object
from training import config

config.register()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="training")
@guarded
def run(composed: DictConfig) -> float | None:
    """One training run; the returned accuracy is what sweepers and launchers read."""
    cfg = to_object(composed)
    cfg.check()
    print(cfg.loss)


def main() -> None:
    run_command(run)


if __name__ == "__main__":
    main()
