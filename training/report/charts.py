"""Which metrics of a run are drawn together, and under which name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """``series``: key in metrics.jsonl → name. ``note`` says what it is, with the unit."""

    title: str
    note: str
    series: dict[str, str]
    log: bool = False
    share: bool = False  # of one: the axis goes from 0 to 1
    zero: bool = False  # the axis begins at 0
    evaluations: bool = False  # accuracies on unseen questions are drawn too


LEARNING = [
    Chart(
        "Reward and accuracy",
        "rollouts: mean per episode; dots: unseen questions with 95% intervals",
        {"reward": "reward", "success": "success"},
        evaluations=True,
    ),
    Chart("Loss", "of the optimizer step", {"loss": "loss"}),
    Chart("Entropy", "nats per token, over trained tokens", {"policy/entropy": "entropy"}, zero=True),
    Chart("Tokens", "written per episode", {"rollout/tokens_per_episode": "tokens"}, zero=True),
    Chart(
        "Tools and thinking",
        "per episode",
        {
            "rollout/tool_calls": "tool calls",
            "rollout/tool_errors": "tool errors",
            "rollout/thinking": "share thinking",
        },
        zero=True,
    ),
    Chart(
        "Engine against trainer",
        "|difference of log-probs|, nats, logarithmic",
        {"policy/mismatch": "mean", "policy/mismatch_max": "largest", "sync/difference": "probe after sync"},
        log=True,
    ),
    Chart(
        "Staleness",
        "updates between the policy that wrote a token and the one that trains on it",
        {"rollout/staleness": "mean", "rollout/staleness_max": "largest"},
        zero=True,
    ),
    Chart(
        "Groups",
        "shares: rollouts whose group varies; groups all right, all wrong",
        {
            "effective_gradient_ratio": "with a gradient",
            "rollout/all_right": "all right",
            "rollout/all_wrong": "all wrong",
        },
        share=True,
    ),
    Chart("Gradient norm", "before clipping", {"grad_norm": "policy", "critic/grad_norm": "critic"}, zero=True),
    Chart("Value model", "share of the returns' variance explained", {"critic/explained_variance": "explained"}),
]
SPEED = [
    Chart(
        "Tokens per second",
        "rollouts: written; training: forward and backward",
        {"rollout/tokens_per_second": "rollouts", "train/tokens_per_second": "training"},
        zero=True,
    ),
    Chart(
        "Engine",
        "shares: slots in use; prompt tokens from the cache",
        {"rollout/occupancy": "occupancy", "rollout/cache_hit_rate": "cache hits"},
        share=True,
    ),
    Chart("Model FLOPs utilisation", "share of the device's dense bf16 peak", {"train/mfu": "MFU"}, zero=True),
    Chart("Training FLOP/s", "model FLOPs, per second of training", {"train/flops": "FLOP/s"}, zero=True),
    Chart("Tools", "seconds per episode", {"rollout/tool_seconds": "tool seconds"}, zero=True),
]


def drawn(charts: Iterable[Chart], known: set[str]) -> list[dict[str, Any]]:
    """Those that have something to show, as the page's script reads them; FLOP/s only where there is no MFU."""
    found = []
    for chart in charts:
        series = {key: name for key, name in chart.series.items() if key in known}
        if series and not ("train/flops" in series and "train/mfu" in known):
            found.append({**vars(chart), "series": series})
    return found
