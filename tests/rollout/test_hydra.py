"""What is wrong with a configuration, on one line; tests/test_conf.py tries the same through the commands."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from rollout import config as rollout_config
from rollout.hydra import EXPECTED, conf_dir, one_line, to_object
from training import config as training_config


def refusal(root: str, *overrides: str) -> str:
    rollout_config.register()
    training_config.register()
    with pytest.raises(EXPECTED) as refused, initialize_config_dir(conf_dir(), version_base="1.3"):
        to_object(compose(root, overrides=["run_dir=unused", *overrides]))
    line = one_line(refused.value)
    assert "\n" not in line and len(line) < 300
    return line


@pytest.mark.parametrize(
    "override, line",
    [
        ("stepz=3", "stepz: unknown key; did you mean steps?"),
        ("batch.promts=3", "batch.promts: unknown key; did you mean batch.prompts?"),
        ("xyzzy=3", "xyzzy: unknown key; --cfg job shows the keys that there are"),
        ("task.sise=3", "task.sise: unknown key; did you mean task.size?"),
        ("loss=clipp", "loss=clipp: no such choice; there are: cispo, clip, clip_symmetric, gspo"),
        ("limits.max_turns=0", "limits.max_turns: 0 must be at least 1"),
        ("task=gsm8k", "task.path: required and not given; add task.path=... to the command"),
        ("nogroup=3", None),
        ("batch=grp", None),
    ],
)  # fmt: skip
def test_the_line_names_key_and_remedy(override: str, line: str | None) -> None:
    text = refusal("training", override)
    assert text == line if line is not None else text.startswith(override.partition("=")[0])


@pytest.mark.parametrize("override", ["steps=many", "kl.coef=[1]", "limits.max_turns=1.5", "resume=perhaps"])
def test_a_wrong_type_names_the_key_and_the_value(override: str) -> None:
    key, _, value = override.partition("=")
    text = refusal("training", override)
    assert text.startswith(f"{key}: ") and text.endswith("; --cfg job shows what it is by default")
    assert value in text or value == "[1]"
