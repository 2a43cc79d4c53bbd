"""``dry_run=true``: the recipes fit, what cannot fit is refused with a remedy that works."""

import re
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir

from rollout.errors import UserError
from rollout.hydra import conf_dir, to_object
from training import config
from training.dry_run import dry_run, plan_input
from training.memory import GIB
from training.memory_plan import plan

RECIPES = ["qwen3_8b_grpo_8xh100", "qwen3_8b_lora_8xh100", "qwen3_8b_tppo_8xh100"]


def settings(*overrides: str):
    config.register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = to_object(compose("training", overrides=["run_dir=unused", *overrides]))
    cfg.check()
    return cfg


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_and_show_their_plan(recipe, capsys):
    dry_run(settings(f"experiment={recipe}"))
    shown = capsys.readouterr().out
    for word in (
        "weights",
        "gradients",
        "optimizer",
        "kept activations",
        "head",
        "KV cache",
        "episodes a step",
        "8.19 B",
    ):
        assert word in shown
    assert "not run on GPU" in shown


def test_what_cannot_fit_is_refused_after_the_plan_was_shown(capsys):
    with pytest.raises(UserError) as refused:
        dry_run(settings("experiment=qwen3_8b_grpo_8xh100", "node.gpus=1", "engine.replicas=1"))
    needs = r"needs [\d.]+ GiB of a GPU's 80 GiB, [\d.]+ GiB too much \(most: optimizer, 91.5 GiB\)"
    more = r"raise node.gpus, or train adapters \(lora=lora\)"
    assert re.fullmatch(f"rollouts: {needs}; {more}; and training: {needs}; {more}", str(refused.value))
    assert "optimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "recipe, change, remedy",
    [
        (
            "qwen3_8b_grpo_8xh100",
            "engine.gpu_memory_utilization=0.9",
            r"lower (engine.gpu_memory_utilization) to ([\d.]+)",
        ),
        ("qwen3_8b_grpo_8xh100", "batch.max_tokens=131072", r"lower (batch.max_tokens) to (\d+)"),
        (
            "qwen3_8b_lora_8xh100",
            "trainer.gradient_checkpointing=false",
            r"add (\+\+trainer.gradient_checkpointing)=(true)",
        ),
    ],
)
def test_a_remedy_works(recipe, change, remedy):
    with pytest.raises(UserError) as refused:
        dry_run(settings(f"experiment={recipe}", change))
    found = re.search(remedy, str(refused.value))
    assert found, refused.value
    overrides = [change] if found[1].strip("+") not in change else []
    dry_run(settings(f"experiment={recipe}", *overrides, f"{found[1]}={found[2]}"))


def test_an_engine_that_stays_awake_on_the_trainers_gpus_is_counted() -> None:
    awake = settings("experiment=qwen3_8b_grpo_8xh100", "engine.sleep_level=0")
    assert plan(plan_input(awake)).phases[1].parts["engine awake"] == int(0.7 * 80 * GIB)
    with pytest.raises(UserError, match=r"training: needs .* engine awake, 56\.0 GiB\); let the engine sleep"):
        dry_run(awake)


def test_an_engine_without_room_for_one_sequence_is_refused():
    with pytest.raises(
        UserError, match=r"engine.gpu_memory_utilization: 0.2 leaves no room for one sequence .* GiB too"
    ):
        dry_run(settings("experiment=qwen3_8b_grpo_8xh100", "engine.gpu_memory_utilization=0.2"))


def test_the_tiny_model_and_a_folder_give_their_own_numbers(tmp_path):
    tiny = plan_input(settings())
    assert tiny.shape.hidden == 128 and tiny.strategy == "replicated"
    assert not plan(tiny).phases[1].parts["gathered weights"]
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,'
        ' "num_attention_heads": 4, "vocab_size": 100, "architectures": ["LlamaForCausalLM"]}'
    )
    folder = plan_input(
        settings("model=hf", f"model.path={tmp_path}", "model.dtype=float32", "+trainer.fsdp=full_shard")
    )
    assert (folder.shape.layers, folder.shape.qk_norm, folder.strategy) == (3, False, "fsdp")
    with pytest.raises(UserError, match=r"model.path: .*config.json is not there; download the model"):
        plan_input(settings("model=hf", "model.path=some/model"))


def test_a_critic_is_planned_beside_the_policy() -> None:
    asked = plan_input(settings("experiment=qwen3_8b_tppo_8xh100"))
    for without, beside in zip(plan(replace(asked, critic=None)).phases, plan(asked).phases, strict=True):
        states = without.parts["weights"] + without.parts["optimizer"]
        assert beside.parts == without.parts | {"critic": states}, "as large as the policy, and it steps before it"


@pytest.mark.parametrize(
    "overrides, launched, own, trainers",
    [
        ([], {}, 0, 8),
        (["engine.replicas=2"], {}, 0, 8),
        (["engine.replicas=2", "engine.devices=[6,7]"], {}, 2, 6),
        (["engine.replicas=2", "engine.devices=[5,6,7]"], {}, 0, 8),
        (["engine.replicas=2", "engine.tensor_parallel_size=2", "engine.devices=[4,5,6,7]"], {}, 4, 4),
        (["engine.replicas=2", "engine.devices=[6,7]"], {"LOCAL_WORLD_SIZE": "7", "WORLD_SIZE": "14"}, 1, 14),
        (["engine.replicas=2", "engine.devices=[6,7]"], {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, 0, 8),
    ],
)
def test_the_plan_is_of_the_engines_and_processes_that_run(overrides, launched, own, trainers, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    asked = plan_input(settings("node.gpus=8", "engine=vllm_process", "sharding=zero3", *overrides))
    assert (asked.engine.own_gpus, asked.trainers) == (own, trainers)
    assert asked.engine.shares == (own < asked.engine.gpus)


@pytest.mark.parametrize(
    "overrides, launched, message",
    [
        (["engine.replicas=3"], {}, r"engine.devices: 3 x 1 devices .* are needed, there are 2; lower engine.replicas"),
        (["engine.devices=[2]"], {}, r"engine.devices: there is no device 2"),
        ([], {"LOCAL_WORLD_SIZE": "3"}, r"node.gpus: 3 processes train on 2 GPUs; start no more than there are GPUs"),
    ],
)
def test_more_engines_or_processes_than_gpus_are_refused(overrides, launched, message, monkeypatch):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        plan_input(settings("node.gpus=2", "engine=vllm_process", *overrides))


def test_recipes_have_an_engine_on_each_gpu():
    for recipe in RECIPES:
        asked = plan_input(settings(f"experiment={recipe}"))
        assert asked.engine.gpus == asked.gpus == asked.trainers == 8
