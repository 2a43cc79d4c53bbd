"""Where the seconds of a step went: parts of ``time/step`` that never overlap.

``time/sync``: weights to the engine, the probe, and an engine's falling asleep. ``time/generate``, ``time/tools``,
``time/reward``: see ``rollout.activity``. ``time/wait``: what else the trainer waited for the rollouts; with
``max_staleness``, where they go on while it trains, all that it waited. ``time/anchor``: the trainer's own log-probs
before the first update. ``time/critic``, ``time/train``: forward, backward and update of the value model and the
policy. ``time/warm_up``: the rounds before that trained the critic alone. ``time/other``: the rest, which is packing,
advantages, checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = ("sync", "generate", "tools", "reward", "wait", "anchor", "critic", "train", "warm_up", "other")


def rollout_seconds(
    before: Mapping[str, float], after: Mapping[str, float], elapsed: float, *, ahead: bool
) -> dict[str, float]:
    """The parts of ``elapsed`` seconds of rollouts, from two looks at ``Activity.seconds``.

    ``ahead``: they went on while the trainer worked, so that what they were busy with is no part of its step.
    """
    spent = {kind: after[kind] - before[kind] for kind in after}
    if ahead:
        spent = {"reward": spent["reward"]}
    parts = {f"time/{kind}": seconds for kind, seconds in spent.items()}
    return parts | {"time/wait": max(0.0, elapsed - sum(parts.values()))}


def remaining(row: Mapping[str, Any]) -> float:
    """Seconds of ``time/step`` that no other part of the row accounts for."""
    return max(0.0, row["time/step"] - sum(row.get(f"time/{part}", 0.0) for part in PARTS if part != "other"))
