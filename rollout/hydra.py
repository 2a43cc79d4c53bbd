"""How every command meets Hydra: where ``conf/`` lies, and errors on one line."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from rollout.errors import EngineDied, UserError, WaitTimeout
from rollout.weights import SyncMismatch

VERBOSE = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user's own wish for tracebacks


def conf_dir() -> str:
    """The folder of configuration files: ``conf/`` of a source tree, or the copy inside an installed package."""
    package = Path(__file__).resolve().parent
    source = package.parent / "conf"
    return str(source if source.is_dir() else package / "conf")


def to_object(cfg: DictConfig) -> Any:
    """The composed configuration as its dataclasses, whose ``__post_init__`` refuse impossible values."""
    try:
        return OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: required and not given; add {error.full_key}=... to the command") from None


# Hydra's --help copies its whole store once a group: seconds for nothing, since loading copies the nodes that it gives.
ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXPECTED = (UserError, EngineDied, WaitTimeout, SyncMismatch, HydraException, OmegaConfBaseException)


def one_line(error: BaseException) -> str:
    """What a person must know of an error, on one line: the key, what is wrong with it, and the remedy."""
    # What the class that a ``_target_`` names has to say, Hydra wraps once for each level of the configuration.
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, InstantiationException | UserError):
        error = error.__cause__
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(error).split())
    key = str(getattr(cause, "full_key", None) or "")
    if missing := re.search(
        r"Could not find '(\S+)/(\S+)' Available options in '\S+': (.*?)(?: Config search|$)", text
    ):
        group, choice, options = missing.groups()
        return f"{group}={choice}: no such choice; there are: {', '.join(options.split())}"
    if key and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        parent = getattr(cause, "parent_node", None)
        schema = getattr(cause, "object_type", None)
        known = [f.name for f in fields(schema)] if is_dataclass(schema) else [str(k) for k in parent or ()]
        near = difflib.get_close_matches(key.rsplit(".", 1)[-1], known, n=1, cutoff=0.5)
        near = [".".join([*key.split(".")[:-1], *near])] if near else []
        return f"{key}: unknown key; " + (
            f"did you mean {near[0]}?" if near else "--cfg job shows the keys that there are"
        )
    if key:
        return f"{key}: {str(cause).splitlines()[0]}; --cfg job shows what it is by default"
    return text


def guarded(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """A command's body for ``hydra.main``: expected errors become one line and exit code 2, before Hydra adds more."""

    @functools.wraps(task)
    def body(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except EXPECTED as error:
            with contextlib.suppress(OSError):
                run_dir().rmdir()  # Hydra made it; what was refused leaves nothing behind
            if VERBOSE:
                raise
            sys.exit(_fail(one_line(error)))
        except OSError as error:
            if VERBOSE or error.errno not in FULL:
                raise
            sys.exit(_fail(f"cannot write {error.filename or run_dir()}: {error.strerror}; free disk space"))

    return body


def run_command(main: Callable[[], Any]) -> None:
    """Run a ``hydra.main`` function: errors before its body become one line and exit code 2, Ctrl-C exit code 130."""
    wished = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints them on several lines and exits by itself
    try:
        main()
    except EXPECTED as error:
        if VERBOSE:
            raise
        sys.exit(_fail(one_line(error)))
    except OSError as error:
        line = None if VERBOSE else _unmade(error)
        if line is None:
            raise
        sys.exit(_fail(line))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", code=130))
    finally:  # a command called by another program must not turn the one-line errors of that program's children off
        if wished is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = wished


def run_dir() -> Path:
    """Where this job writes: ``run_dir`` of a single run, or the job's own folder in a sweep."""
    path = Path(HydraConfig.get().runtime.output_dir)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _unmade(error: OSError) -> str | None:
    """The line for a directory that Hydra could not make for a run or a sweep; None for an error from elsewhere."""
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    maker = next(module for module in reversed(modules) if module != "pathlib")
    if modules[-1] != "pathlib" or maker.partition(".")[0] not in ("hydra", "hydra_plugins"):
        return None
    key = "run_dir" if maker == "hydra.core.utils" else "hydra.sweep.dir"
    remedy = "free disk space" if error.errno in FULL else f"give another {key}"
    return f"{key}: cannot make {error.filename} ({error.strerror}); {remedy}"


def _fail(line: str, code: int = 2) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code
