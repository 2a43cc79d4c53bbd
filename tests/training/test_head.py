import numpy as np
import pytest
import torch

from rollout.errors import UserError
from training.head import attach_head, respects_boundaries, token_logprobs
from training.packing import TrainSequence, empty_like, pack, unpack

VOCABULARY = 97
LENGTHS = [5, 9, 17, 2, 11]


def tiny_qwen3(scale=4):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # far from uniform, so that a wrong mask shows
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def model():
    model = tiny_qwen3()
    attach_head(model, temperature=0.7)
    return model


def sequences():
    generator = np.random.default_rng(0)
    result = []
    for index, length in enumerate(LENGTHS):
        own = np.arange(length) >= length // 2
        own[0] = False
        zeros = np.zeros(length)
        result.append(TrainSequence(generator.integers(0, VOCABULARY, length), own, zeros, zeros, zeros, index, zeros))
    return result


def one_by_one(model, sequence):
    """Log-probs and entropies of all targets from the model's own logits, one sequence without any packing."""
    ids = torch.as_tensor(sequence.token_ids)[None]
    logps = (model(input_ids=ids).logits[0, :-1].double() / 0.7).log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize(("max_tokens", "row_tokens"), [(64, None), (64, 20), (20, None), (64, 1)])
def test_packed_equals_one_by_one(model, max_tokens, row_tokens):
    given = sequences()
    found = 0
    for batch in pack(given, max_tokens=max_tokens, row_tokens=row_tokens, pad_id=0):
        logprobs, entropies = (unpack(batch, x) for x in token_logprobs(model, batch))
        for index, values in logprobs.items():
            found += 1
            own = given[index].own_mask[1:]
            expected, entropy = one_by_one(model, given[index])
            np.testing.assert_allclose(values, expected.detach()[own], atol=2e-6)
            np.testing.assert_allclose(entropies[index], entropy.detach()[own], atol=2e-6)
    assert found == len(LENGTHS)


def test_every_target_scores_injected_tokens_too(model):
    given = sequences()
    (batch,) = pack(given, max_tokens=64, pad_id=0)
    logprobs, entropy = token_logprobs(model, batch, every_target=True)
    assert logprobs.shape == entropy.shape == (sum(LENGTHS) - len(LENGTHS),)
    full = torch.zeros(batch.shape).masked_scatter(batch.targets != -100, logprobs.detach())
    for index, values in unpack(batch, full).items():
        np.testing.assert_allclose(values[:-1], one_by_one(model, given[index])[0].detach(), atol=2e-6)


def test_gradients_equal_one_by_one():
    model = tiny_qwen3()
    attach_head(model, temperature=0.7)
    given = sequences()
    sum(one_by_one(model, x)[0][torch.as_tensor(x.own_mask[1:])].sum() for x in given).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for batch in pack(given, max_tokens=40, row_tokens=20, pad_id=0):
        token_logprobs(model, batch)[0].sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_every_parameter_a_zero_gradient(model):
    model.zero_grad()
    (batch,) = pack(sequences()[:2], max_tokens=64, pad_id=0)
    token_logprobs(model, empty_like(batch))[0].sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


class Blind(torch.nn.Module):
    """A model that takes packed rows but does not look at the boundaries."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, position_ids, **inputs):
        return self.model(**inputs)


class Leaky(torch.nn.Module):
    """Positions restart, but attention goes on across boundaries: variable-length attention given several rows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **inputs):
        return self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("scale", [1, 4])
def test_the_probe_tells_models_apart(rows, dtype, scale):
    model = tiny_qwen3(scale).to(dtype)
    attach_head(model)
    assert respects_boundaries(model, VOCABULARY, rows=rows)
    assert not respects_boundaries(Blind(model), VOCABULARY, rows=rows)
    assert not respects_boundaries(Leaky(model), VOCABULARY, rows=rows)


def test_the_probe_leaves_the_mode_as_it_was(model):
    model.train()
    respects_boundaries(model, VOCABULARY)
    assert model.training
    model.eval()
    respects_boundaries(model, VOCABULARY)
    assert not model.training


def test_an_adapter_keeps_the_head():
    from peft import LoraConfig, get_peft_model

    model = tiny_qwen3()
    attach_head(model, temperature=0.7)
    (batch,) = pack(sequences(), max_tokens=64, pad_id=0)
    expected = token_logprobs(model, batch)[0].detach()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    logprobs = token_logprobs(adapted, batch)[0]
    torch.testing.assert_close(logprobs, expected)  # a fresh adapter changes nothing
    logprobs.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())


def test_greedy_training_is_refused():
    with pytest.raises(UserError, match=r"sampling\.temperature"):
        attach_head(tiny_qwen3(), temperature=0.0)
