"""The options of the plug-in: what ``--additional-config '{"turnstile": {...}}'`` may hold."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rollout.errors import UserError
from rollout.scheduling.policies import POLICIES, STOCK
from rollout.scheduling.policy import Policy

KEY = "turnstile"
CLAIRVOYANT = "clairvoyant"  # a bound, not a policy
_VARIABLE = re.compile(r"\$\w+|\$\{\w+\}", re.ASCII)


@dataclass
class Options:
    """General options; every other key goes to the policy's constructor.

    Paths may hold environment variables (``$NAME``), which are the engine process's; one that comes out empty is none.
    """

    policy: str = "turnstile"
    infer_programs: bool = False  # requests without an id: a prompt that extends a finished request's goes on with it
    max_pinned: float = 1.0  # share of the pool that pins may hold at most
    latencies: Path | None = None  # tool latencies to start from
    save_latencies: Path | None = None  # kept up to date here
    metrics_path: Path | None = None  # snapshot for the front end's /metrics, and records of finished jobs beside it
    metrics_port: int | None = None  # own Prometheus end point of the engine-core process
    settings: dict[str, Any] = field(default_factory=dict)  # of the policy

    @classmethod
    def read(cls, additional_config: Any, *, writes: bool = True) -> Options:
        """Check what came by ``--additional-config``; all defaults if nothing did. ``writes``: the files, here."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise UserError(f'additional_config["{KEY}"]: {given!r} is no mapping of options; give {{"policy": …}}')
        own = {f.name: f for f in fields(cls) if f.name != "settings"}
        values = {name: value for name, value in given.items() if name in own and value is not None}
        for name in ("latencies", "save_latencies", "metrics_path"):
            if name in values:
                values[name] = _path(name, values[name])
        options = cls(**values, settings={name: value for name, value in given.items() if name not in own})
        options._check()
        for name in ("save_latencies", "metrics_path") if writes else ():
            path = getattr(options, name)
            if path is not None:
                _check_writable(f"scheduler options: {name}={path}", path)
        return options

    def build(self) -> Policy:
        """The policy with its settings.

        Raises:
            UserError: a setting that it does not have, lacks, or cannot take.
        """
        member = POLICIES[self.policy]
        wanted = {
            k: v
            for k, v in inspect.signature(member.__init__).parameters.items()
            if k not in ("self", "args", "kwargs")
        }
        unknown = sorted(set(self.settings) - set(wanted), key=str)
        if unknown:
            known = sorted({*wanted, *(f.name for f in fields(self) if f.name != "settings")})
            raise UserError(f"scheduler options: {self.policy} knows no {unknown[0]!r}; there are: {', '.join(known)}")
        missing = [k for k, v in wanted.items() if v.default is inspect.Parameter.empty and k not in self.settings]
        if missing:
            raise UserError(
                f"scheduler options: {self.policy} needs {missing[0]}; give scheduler.options.{KEY}.{missing[0]}=…"
            )
        for name, value in self.settings.items():
            if not _number(value):
                raise UserError(f"scheduler options: {self.policy}: {name}={value!r} is no number")
        try:
            return member(**self.settings)
        except ValueError as error:
            raise UserError(f"scheduler options: {self.policy}: {error}") from error

    def _check(self) -> None:
        if self.policy not in (*STOCK, *POLICIES):
            raise UserError(
                f"scheduler options: unknown policy {self.policy!r}; there are: {', '.join((*STOCK, *POLICIES))}"
            )
        if not _number(self.max_pinned) or not 0 < self.max_pinned <= 1:
            raise UserError(f"scheduler options: max_pinned={self.max_pinned!r} must be a number in (0, 1]")
        if not isinstance(self.infer_programs, bool):
            raise UserError(f"scheduler options: infer_programs={self.infer_programs!r} must be true or false")
        port = self.metrics_port
        if port is not None and (not isinstance(port, int) or not _number(port) or not 0 <= port < 1 << 16):
            raise UserError(f"scheduler options: metrics_port={port!r} must be a whole number from 0 to 65535")
        if self.policy in STOCK and self.settings:
            raise UserError(f"scheduler options: {self.policy} is stock and knows no {next(iter(self.settings))!r}")


def _path(name: str, value: Any) -> Path | None:
    """A path with its environment variables put in; None for ``$NAME`` where that is empty."""
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"scheduler options: {name}={value!r} is no path; give the name of a file")
    for variable in _VARIABLE.findall(str(value)):
        if variable.strip("${}") not in os.environ:
            raise UserError(f"scheduler options: {name}={value}: the engine's environment has no {variable}; set it")
    expanded = os.path.expandvars(str(value))
    return Path(expanded) if expanded else None


def _check_writable(key: str, path: Path) -> None:
    """Refuse what the engine would fail on, once it has loaded the model."""
    folder = path.absolute().parent
    if not os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises where a folder above is shut
        raise UserError(f"{key}: there is no such folder; make it first")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{key}: {folder} cannot be written by this user; give a file elsewhere, as in /tmp")
    if path.is_dir():
        raise UserError(f"{key}: is a folder; give a file in it")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
