"""What a run prints to type next is taken by the command that it names."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from rollout import config as rollout_config
from rollout.hydra import conf_dir, to_object
from training import config as training_config
from training.summary import evaluation_settings

GRADED = {"1": 0.5, "2": 0.0, "3": 0.5}


def composed(root: str, *overrides: str) -> Any:
    rollout_config.register()
    training_config.register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return to_object(compose(root, ["run_dir=unused", *overrides]))


@pytest.mark.parametrize(
    "task, settings",
    [
        ("arithmetic", ["experiment=quickstart"]),
        ("arithmetic", ["experiment=otc"]),
        ("arithmetic", ["experiment=adacot", "limits.max_new_tokens=77"]),
        ("arithmetic", ["experiment=otc_adacot"]),
        ("long_chain", ["experiment=long_chain"]),
        ("gsm8k", ["experiment=gsm8k_tiny", "task.path=a folder"]),
        (
            "dataset",
            ["task=dataset", "task.path=x", "task.data_files={train: a.jsonl, test: b.jsonl}", "task.tools=[a.b]"],
        ),
        ("custom", ["task=custom", "task._target_=x.Y", "+task.size=3", "+task.words=[a,b]", "+task.mix.1=0.5"]),
    ],
)
def test_the_evaluation_takes_the_runs_task_and_limits(task: str, settings: list[str]) -> None:
    trained = composed("training", *settings)
    evaluated = composed("evaluate", *shlex.split(evaluation_settings(trained, task)))
    if task == "arithmetic":
        trained.task.demonstration_mix = None
    assert evaluated.task == trained.task
    assert (evaluated.limits, evaluated.engine.max_model_len) == (trained.limits, trained.engine.max_model_len)
