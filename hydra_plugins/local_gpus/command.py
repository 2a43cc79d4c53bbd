"""The command that runs one job of a sweep: the one that was typed, with the job's overrides."""

from __future__ import annotations

import sys

from hydra.errors import CompactHydraException
from omegaconf import DictConfig

# The parent's own business: a job runs once, where it is told to, in its own directory.
PARENT_ONLY = (
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.sweeper",
    "hydra.mode",
    "hydra.sweep",
    "hydra.run",
)


def program(argv: list[str]) -> list[str]:
    """The part of an interpreter's command line (``sys.orig_argv``) that names the program: without its arguments."""
    position = 1
    while position < len(argv):
        argument = argv[position]
        if argument == "-m":
            return [sys.executable, *argv[1 : position + 2]]
        if argument == "-c":
            break
        if not argument.startswith("-"):
            return [sys.executable, *argv[1 : position + 1]]
        position += 2 if argument in ("-X", "-W") else 1
    raise CompactHydraException(
        "hydra/launcher=local_gpus: runs its jobs by the same command, so it needs a script or `python -m`"
    )


def job_command(config: DictConfig, overrides: list[str]) -> list[str]:
    """Command of the job that ``config`` (composed for it, output_dir set) describes; ``overrides`` are its own."""
    hydra = config.hydra
    command = program(sys.orig_argv)
    for source in hydra.runtime.config_sources:
        flag = {"main": "--config-path", "command-line": "--config-dir"}.get(source.provider)
        if flag:
            command += [flag, str(source.path)]
    if hydra.job.config_name:
        command += ["--config-name", hydra.job.config_name]
    inherited = [text for text in hydra.overrides.hydra if not text.lstrip("+~").startswith(PARENT_ONLY)]
    own = [
        "hydra.mode=RUN",
        f"hydra.run.dir={_quoted(hydra.runtime.output_dir)}",
        f"hydra.job.num={hydra.job.num}",
        f"hydra.job.id={_quoted(hydra.job.id)}",
        "+hydra.callbacks.local_gpus._target_=hydra_plugins.local_gpus.callback.ReturnValue",
    ]
    return [*command, *overrides, *inherited, *own]


def _quoted(text: str) -> str:
    """A string as Hydra's override grammar wants it: commas, blanks and equal signs taken literally."""
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
