"""The value model: what it says of packed tokens, how it learns, and that a saved one goes on with the same bits."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import UserError
from training.critic import Critic, adamw, deepspeed_settings, make_critic
from training.members import ValueModelConfig
from training.models import build_tiny, load_tokenizer
from training.packing import TrainSequence, pack, unpack
from training.settings import OptimizerConfig
from training.values import HeadlessProbe, load_value_model

LENGTHS = [5, 9, 17, 2, 11, 7]
PACKINGS = [(64, None), (64, 20), (20, None), (64, 1)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden": 32, "mlp": 48, "heads": 2, "head_dim": 16}
    return build_tiny(tmp_path_factory.mktemp("policy"), ["1 + 2 = 3"] * 4, **shape)


@pytest.fixture(scope="module")
def spread(policy: Path) -> Any:
    """A value model whose values differ, and change where it sees another sequence."""
    model = load_value_model(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def made(
    policy: Path, tmp_path: Path, config: ValueModelConfig | None = None, model: Any = None, **options: Any
) -> Critic:
    from accelerate import Accelerator
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    accelerator, tokenizer, config = Accelerator(cpu=True), load_tokenizer(policy), config or ValueModelConfig()
    total = options.pop("total_steps", 10)
    if model is not None:
        return Critic(copy.deepcopy(model), tokenizer, config, accelerator, total_steps=total)
    return make_critic(config, policy, tokenizer, arguments, accelerator, total_steps=total, **options)


def sequences(lengths: list[int] = LENGTHS, seed: int = 0) -> list[TrainSequence]:
    """Own tokens among others, with weights, returns and old values of their own."""
    generator, result = np.random.default_rng(seed), []
    for index, length in enumerate(lengths):
        own = generator.random(length) < 0.7
        own[0], own[-1] = False, length > 1
        weights, returns, values = (np.where(own, x, 0.0) for x in generator.normal(size=(3, length)))
        ids = generator.integers(0, 250, length)
        zeros = np.zeros(length)
        result.append(TrainSequence(ids, own, zeros, zeros, abs(weights), index, zeros, returns, values))
    return result


def packed(given: list[TrainSequence], max_tokens: int = 64, row_tokens: int | None = 20) -> list[Any]:
    return pack(given, max_tokens=max_tokens, row_tokens=row_tokens, pad_id=0)


def one_by_one(model: Any, sequence: TrainSequence) -> torch.Tensor:
    """V before each own token, out of the model as it is, without any packing."""
    values = model(input_ids=torch.as_tensor(sequence.token_ids)[None]).logits[0, :-1, 0]
    return values[torch.as_tensor(sequence.own_mask[1:])]


def loss_of(values: torch.Tensor, sequence: TrainSequence, clip: float | None) -> torch.Tensor:
    own = sequence.own_mask
    returns, old, weights = (torch.as_tensor(x[own]) for x in (sequence.returns, sequence.values, sequence.weights))
    error = (values.double() - returns) ** 2
    if clip is not None:
        bounded = torch.min(torch.max(values.double(), old - clip), old + clip)
        error = torch.max(error, (bounded - returns) ** 2)
    return (weights * 0.5 * error).sum()


def test_a_critic_begins_with_nothing_to_say(policy: Path, tmp_path: Path) -> None:
    critic = made(policy, tmp_path)
    batches = packed(sequences())
    for batch, values in zip(batches, critic.values(batches), strict=True):
        assert values.shape == (int(batch.policy_mask.sum()),) and values.dtype == torch.float32
        assert (values == 0).all()
    trunk = load_value_model(policy).model.layers[0].mlp.up_proj.weight
    assert torch.equal(critic.model.model.layers[0].mlp.up_proj.weight, trunk) and trunk.abs().sum() > 0
    assert all(module.p == 0 for module in critic.model.modules() if isinstance(module, torch.nn.Dropout))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from(PACKINGS), st.integers(0, 99))
def test_packed_values_are_those_of_one_sequence_alone(
    policy: Path, spread: Any, tmp_path_factory: pytest.TempPathFactory, lengths: list[int], packing: Any, seed: int
) -> None:
    critic = made(policy, tmp_path_factory.getbasetemp(), model=spread)
    given_ = sequences(lengths, seed)
    batches = packed(given_, max(packing[0], max(lengths)), packing[1])
    found = {}
    for batch, values in zip(batches, critic.values(batches), strict=True):
        found |= unpack(batch, values)
    for sequence in given_:
        expected = one_by_one(spread, sequence).detach()
        got = found.get(sequence.index, np.zeros(0))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("clip", [0.2, None])
def test_a_step_is_adamw_on_the_sum_over_sequences(
    policy: Path, spread: Any, tmp_path: Path, packing: Any, clip: float | None
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1)
    critic = made(policy, tmp_path, ValueModelConfig(clip=clip, optimizer=optimizer), spread)
    given_ = sequences()
    expected = copy.deepcopy(spread).eval()
    values = [one_by_one(expected, sequence) for sequence in given_]
    loss = sum(loss_of(v, s, clip) for v, s in zip(values, given_, strict=True))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
    assert norm > 0.5, "clipping must be seen"
    decayed = [p for p in expected.parameters() if p.ndim == 2]
    rest = [p for p in expected.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)).step()

    metrics = critic.step(packed(given_, *packing))
    assert metrics["critic/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["critic/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert metrics["critic/learning_rate"] == 1e-2
    flat = torch.cat(values).detach().double().numpy()
    own = [(s.returns[s.own_mask], s.values[s.own_mask]) for s in given_]  # type: ignore[index]
    returns, old = (np.concatenate(x) for x in zip(*own, strict=True))
    assert metrics["critic/explained_variance"] == pytest.approx(1 - np.var(returns - flat) / np.var(returns), abs=1e-3)
    bounded = flat if clip is None else np.clip(flat, old - clip, old + clip)
    clipped = np.mean(abs(bounded - returns) > abs(flat - returns) + 1e-9)
    assert metrics["critic/clipped"] == pytest.approx(clipped, abs=1e-9)
    # Adam divides by the gradient's size: compare what it makes of gradients that are more than rounding.
    for (name, got), wanted in zip(critic.model.named_parameters(), expected.parameters(), strict=True):
        assert wanted.grad is not None
        real = wanted.grad.abs() > 1e-5
        assert real.any(), name
        torch.testing.assert_close(got[real], wanted[real], rtol=1e-3, atol=2e-4)


def test_it_learns_what_it_is_told(policy: Path, tmp_path: Path) -> None:
    config = ValueModelConfig(clip=None, optimizer=OptimizerConfig(learning_rate=1e-2))
    critic, given_ = made(policy, tmp_path, config), sequences()
    tokens = sum(int(s.own_mask.sum()) for s in given_)
    for sequence in given_:
        sequence.weights = np.where(sequence.own_mask, 1 / tokens, 0.0)
    explained = [critic.step(packed(given_))["critic/explained_variance"] for _ in range(60)]
    assert explained[0] == pytest.approx(0, abs=1e-6) and explained[-1] > 0.8
    assert torch.cat(critic.values(packed(given_))).std() > 0.5


def test_equal_returns_leave_nothing_to_explain(policy: Path, tmp_path: Path) -> None:
    given_ = sequences()
    for sequence in given_:
        sequence.returns = np.where(sequence.own_mask, 0.1, 0.0)
    assert made(policy, tmp_path).step(packed(given_))["critic/explained_variance"] == 0.0


def test_the_schedule_sets_the_rate_of_every_step(policy: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=0.4, lr_scheduler_type="linear", warmup_steps=2)
    critic = made(policy, tmp_path, ValueModelConfig(optimizer=optimizer), total_steps=6)
    rates = [critic.step(packed(sequences()))["critic/learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.3, 0.2, 0.1])


def test_without_value_tokens_nothing_steps(policy: Path, spread: Any, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=0.4, lr_scheduler_type="linear", warmup_steps=2)
    critic = made(policy, tmp_path, ValueModelConfig(optimizer=optimizer), spread)
    before = copy.deepcopy(critic.model.state_dict())
    given_ = sequences()
    for sequence in given_:
        sequence.own_mask[:] = False
    assert critic.step([]) == critic.step(packed(given_)) == {} and critic.values([]) == []
    assert all(torch.equal(value, before[name]) for name, value in critic.model.state_dict().items())
    assert critic.step(packed(sequences()))["critic/learning_rate"] == 0, "the schedule has not moved"


def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_step(
    policy: Path, spread: Any, tmp_path: Path
) -> None:
    critic, given_ = made(policy, tmp_path, model=spread), sequences()
    before = copy.deepcopy(critic.model.state_dict())
    given_[0].returns = np.where(given_[0].own_mask, math.nan, 0.0)
    with pytest.raises(
        UserError, match=r"^the loss of the critic's step 1 is nan; .*critic\.optimizer\.learning_rate$"
    ):
        critic.step(packed(given_))
    critic.optimizer.zero_grad()
    critic.model.score.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"^the gradient norm of the critic's step 1 is (inf|nan); "):
        critic.step(packed(sequences()))
    assert all(torch.equal(value, before[name]) for name, value in critic.model.state_dict().items())


def test_a_saved_critic_is_an_ordinary_model_and_goes_on_with_the_same_bits(policy: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    optimizer = OptimizerConfig(learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=3, weight_decay=0.1)
    config = ValueModelConfig(optimizer=optimizer)
    critic = made(policy, tmp_path, config)
    for seed in range(4):
        critic.step(packed(sequences(seed=seed)))
    critic.save(tmp_path / "step-4")

    folder = tmp_path / "step-4" / "critic"
    plain, loading = AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and plain.config.num_labels == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), critic.model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == load_tokenizer(policy).get_vocab()

    ahead = [critic.step(packed(sequences(seed=seed))) for seed in range(4, 7)]
    expected = copy.deepcopy(critic.model.state_dict())
    later = made(policy, tmp_path, config, resume=tmp_path / "step-4")
    assert [later.step(packed(sequences(seed=seed))) for seed in range(4, 7)] == ahead
    assert all(torch.equal(value, expected[name]) for name, value in later.model.state_dict().items())
    assert later.steps == critic.steps == 7


def test_a_value_model_of_its_own_keeps_its_head(policy: Path, spread: Any, tmp_path: Path) -> None:
    critic = made(policy, tmp_path, model=spread)
    critic.save(tmp_path)
    again = made(policy, tmp_path, ValueModelConfig(path=str(tmp_path / "critic")))
    assert torch.equal(again.model.score.weight, spread.score.weight) and spread.score.weight.abs().sum() > 0
    assert again.steps == 0 and not again.optimizer.state_dict()["state"], "a new optimizer"


def test_what_cannot_be_a_critic_is_refused_in_one_line(policy: Path, spread: Any, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as error:
            made(policy, tmp_path, ValueModelConfig(path=str(path)))
        assert "\n" not in str(error.value)
        return str(error.value)

    other = build_tiny(tmp_path / "other", ["so viele andere Worte"] * 4, hidden=32, mlp=48, heads=2, head_dim=16)
    line = refused(other)
    assert line.startswith(f"critic.path: the tokenizer of {other} is not the policy's (") and "null" in line

    assert "no such checkpoint" in refused(tmp_path / "nowhere")

    bare = tmp_path / "bare"
    bare.mkdir()
    for file in policy.glob("*"):
        if "token" not in file.name:
            shutil.copy(file, bare)
    assert refused(bare).startswith(f"{bare} has no tokenizer_config.json: ")

    half = tmp_path / "half"
    load_tokenizer(policy).save_pretrained(half)
    weights = {name: value for name, value in spread.state_dict().items() if "layers.1" not in name}
    spread.save_pretrained(half, state_dict=weights)
    assert refused(half).startswith(f"{half} lacks model.layers.1.")

    classes = tmp_path / "classes"
    load_tokenizer(policy).save_pretrained(classes)
    several = copy.deepcopy(spread)
    several.score, several.config.num_labels = torch.nn.Linear(32, 3), 3
    several.save_pretrained(classes)
    assert refused(classes).startswith(f"{classes}: cannot make a value model of it: ")

    with pytest.raises(UserError, match=f"^{policy} has no critic: it was trained without one; take critic=none"):
        made(policy, tmp_path, resume=policy)


class Blind(torch.nn.Module):
    """A trunk that does not look at the boundaries."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, position_ids: torch.Tensor, **inputs: Any) -> Any:
        return self.model(**inputs)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_probe_reads_the_trunk_where_the_head_is_silent(policy: Path, tmp_path: Path, rows: int) -> None:
    from training.head import respects_boundaries

    critic = made(policy, tmp_path)
    assert critic.respects_boundaries(rows)
    blind: Any = Blind(critic.model)
    assert not respects_boundaries(HeadlessProbe(blind), 250, rows=rows)


def test_deepspeed_settings_are_the_policys_with_the_critics_own_optimizer() -> None:
    given_ = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    got = deepspeed_settings(given_, OptimizerConfig(max_grad_norm=0.7), bf16=True)
    assert got == {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "gradient_clipping": 0.7,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_vectors_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    matrices, vectors = adamw(model, OptimizerConfig(weight_decay=0.5)).param_groups
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.5
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0


REFUSED = {
    "advantage=gae": r"critic: gae and egae read a value model; add critic=value_model",
    "advantage=egae": r"critic: gae and egae read a value model; add critic=value_model",
    "critic=value_model": r"critic: nobody reads its values; take critic=none, or advantage=gae or egae",
    "advantage=gae critic=value_model critic.dtype=bfloat16": r"critic\.dtype: bfloat16 under AdamW loses small",
    "advantage=gae critic=value_model critic.dtype=float16": r"critic\.dtype: 'float16' is not float32 or bfloat16",
    "advantage=gae critic=value_model critic.clip=0": r"critic\.clip: 0\.0 must be above 0; null does not clip",
    "advantage=gae critic=value_model critic.minibatches=0": r"critic\.minibatches: 0 must be at least 1",
    "advantage=gae critic=value_model critic.warmup_rounds=-1": r"critic\.warmup_rounds: -1 must not be negative",
    "advantage=gae critic=value_model critic.optimizer.lr_scheduler_type=greedy": r"critic\.optimizer\.lr_sch.*linear",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_settings_that_cannot_work_are_refused(overrides: str) -> None:
    from tests.training.test_config import checked

    with pytest.raises(UserError, match=REFUSED[overrides]):
        checked(*overrides.split())


def test_gae_and_egae_go_with_a_value_model() -> None:
    from tests.training.test_config import checked

    for name in ("gae", "egae"):
        cfg = checked(f"advantage={name}", "critic=value_model", "budget.samples=1")
        assert cfg.critic == ValueModelConfig() and cfg.critic.optimizer.learning_rate == 2e-6
    sharded = checked("advantage=gae", "critic=value_model", "critic.dtype=bfloat16", "+trainer.deepspeed={}")
    assert sharded.critic.dtype == "bfloat16"
    assert ValueModelConfig(warmup_rounds=2, warmup_epochs=3, epochs=4, minibatches=5).steps(7) == 5 * (2 * 3 + 7 * 4)
