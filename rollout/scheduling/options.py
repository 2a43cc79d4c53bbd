"""The options of the plug-in: what ``--additional-config '{"turnstile": {...}}'`` may hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rollout.errors import UserError
from rollout.scheduling.policies import POLICIES, STOCK, Policy

KEY = "turnstile"
CLAIRVOYANT = "clairvoyant"  # a bound, not a policy


@dataclass
class Options:
    """General options; every other key goes to the policy's constructor."""

    policy: str = "turnstile"
    infer_programs: bool = False  # requests without an id: a prompt that extends a finished request's goes on with it
    max_pinned: float = 1.0  # share of the pool that pins may hold at most
    latencies: Path | None = None  # tool latencies to start from
    save_latencies: Path | None = None  # kept up to date here, and at shutdown
    metrics_path: Path | None = None  # snapshot for the front end's /metrics, and records of finished jobs beside it
    metrics_port: int | None = None  # own Prometheus end point of the engine-core process
    settings: dict[str, Any] = field(default_factory=dict)  # of the policy

    @classmethod
    def read(cls, additional_config: Any) -> Options:
        """Check what came by ``--additional-config``; all defaults if nothing did."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise UserError(f'additional_config["{KEY}"]: {given!r} is no mapping of options; give {{"policy": …}}')
        own = {f.name: f for f in fields(cls) if f.name != "settings"}
        values = {name: value for name, value in given.items() if name in own and value is not None}
        for name in ("latencies", "save_latencies", "metrics_path"):
            if name in values:
                values[name] = Path(values[name])
        options = cls(**values, settings={name: value for name, value in given.items() if name not in own})
        options._check()
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
        unknown = sorted(set(self.settings) - set(wanted))
        if unknown:
            known = sorted({*wanted, *(f.name for f in fields(self) if f.name != "settings")})
            raise UserError(f"scheduler options: {self.policy} knows no {unknown[0]!r}; there are: {', '.join(known)}")
        missing = [k for k, v in wanted.items() if v.default is inspect.Parameter.empty and k not in self.settings]
        if missing:
            raise UserError(
                f"scheduler options: {self.policy} needs {missing[0]}; give scheduler.options.{missing[0]}=…"
            )
        try:
            return member(**self.settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"scheduler options: {self.policy}: {error}") from error

    def _check(self) -> None:
        if self.policy not in (*STOCK, *POLICIES):
            raise UserError(
                f"scheduler options: unknown policy {self.policy!r}; there are: {', '.join((*STOCK, *POLICIES))}"
            )
        if isinstance(self.max_pinned, bool) or not 0 < float(self.max_pinned) <= 1:
            raise UserError(f"scheduler options: max_pinned={self.max_pinned!r} must lie in (0, 1]")
        if self.policy in STOCK and self.settings:
            raise UserError(f"scheduler options: {self.policy} is stock and knows no {next(iter(self.settings))!r}")
