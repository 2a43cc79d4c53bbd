"""Runs of a sweep are named by what tells them apart."""

from __future__ import annotations

from training.sweep import flat, names


def test_names_are_the_settings_that_differ() -> None:
    runs = [
        {"run_dir": f"sweep/{i}", "seed": 0, "reward": {"alpha": alpha, "prices": {}}, "advantage": each}
        for i, (alpha, each) in enumerate([(0.1, {"clip": None}), (0.3, {"clip": None}), (0.3, {"lam": 1})])
    ]
    assert names([flat(run) for run in runs]) == [
        "reward.alpha=0.1",
        "reward.alpha=0.3",
        "reward.alpha=0.3, advantage.lam=1",
    ]
    assert names([flat(run) for run in runs[1:2]]) == ["0"]
