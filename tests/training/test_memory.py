"""The memory plan against real models: parameters, gradients, optimizer and saved activations, byte by byte."""

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from rollout.errors import UserError
from training import memory
from training.head import attach_head, token_logprobs
from training.memory import GIB, EnginePlan, PlanInput
from training.memory_plan import batch_plan, plan
from training.model_shape import Shape, build_shape
from training.packing import TrainSequence, pack

LORA = {"r": 8, "target_modules": "all-linear"}


def architecture(layers: int = 2, **changes) -> dict:
    return {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
        "tie_word_embeddings": False,
        **changes,
    }


def real_model(numbers: dict, dtype: torch.dtype, lora: dict | None = None, adapter: int = 4) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**numbers), dtype=dtype, attn_implementation="sdpa")
    if lora is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), autocast_adapter_dtype=adapter == 4)
    return model.train()


def inputs(shape: Shape, **changes) -> PlanInput:
    plain = PlanInput(
        shape=shape,
        strategy="replicated",
        gpus=1,
        memory=80 * GIB,
        weight_bytes=4,
        compute_bytes=4,
        master=False,
        moment_bytes=4,
        checkpointing=False,
        max_tokens=1024,
        reference=False,
        engine=EnginePlan(4, 0.5, 256, 8),
        prompts=4,
        samples=4,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_model_states_equal_those_of_a_real_model_after_a_step(tied, lora):
    numbers = architecture(tie_word_embeddings=tied)
    model = real_model(numbers, torch.float32, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    states = memory.model_states(inputs(build_shape(numbers, lora=lora)))
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert states == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(m.nbytes for m in moments),
    }


def saved_bytes(
    numbers: dict, dtype: torch.dtype, tokens: int, checkpointing: bool, *adapter, autocast: bool = False, rows: int = 1
) -> int:
    """Bytes that autograd keeps after a forward of the decoder, each storage once, parameters and buffers not.

    ``rows``: sequences that are packed into the one row, which SDPA keeps apart by a mask."""
    model = real_model(numbers, dtype, *adapter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    decoder = getattr(model, "get_base_model", lambda: model)().model
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # holding it keeps the address from being used again
        return tensor

    positions = torch.arange(tokens // rows).repeat(rows)[None]
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        decoder(input_ids=torch.randint(0, 256, (1, tokens)), position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)


# peft makes 32-bit adapters, in a 16-bit model too; DeepSpeed turns those into 16 bits.
@pytest.mark.parametrize(
    "dtype, lora, adapter",
    [
        (torch.float32, None, 4),
        (torch.float32, LORA, 4),
        (torch.bfloat16, None, 4),
        (torch.bfloat16, LORA, 4),
        (torch.bfloat16, LORA, 2),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointing"])
def test_activations_of_a_layer_equal_what_autograd_saves(dtype, lora, adapter, checkpointing):
    tokens = 96
    # Two depths: what the embedding, the last norm and the rotary tables keep cancels out.
    deep, shallow = (saved_bytes(architecture(n), dtype, tokens, checkpointing, lora, adapter) for n in (5, 2))
    shape = build_shape(architecture(3), lora=lora)
    planned = inputs(
        shape, compute_bytes=dtype.itemsize, adapter_bytes=adapter, max_tokens=tokens, checkpointing=checkpointing
    )
    assert deep - shallow == memory.kept_activations(planned)


@pytest.mark.parametrize("dtype, lora", [(torch.float32, None), (torch.bfloat16, LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointing"])
def test_activations_under_autocast_equal_what_autograd_saves(dtype, lora, checkpointing):
    """float32 weights leave a float32 residual stream behind, and copies of themselves in 16 bits."""
    tokens = 96
    deep, shallow = (saved_bytes(architecture(n), dtype, tokens, checkpointing, lora, autocast=True) for n in (5, 2))
    planned = inputs(
        build_shape(architecture(3), lora=lora),
        weight_bytes=dtype.itemsize,
        compute_bytes=2,
        autocast=True,
        max_tokens=tokens,
        checkpointing=checkpointing,
    )
    assert deep - shallow == memory.kept_activations(planned)


def test_a_mask_costs_its_numbers_in_every_layer_and_repeated_keys_and_values():
    tokens = 96
    deep, shallow = (saved_bytes(architecture(n), torch.bfloat16, tokens, False, rows=2) for n in (5, 2))
    planned = inputs(build_shape(architecture(3)), compute_bytes=2, max_tokens=tokens, masked=tokens)
    assert deep - shallow == memory.kept_activations(planned)
    assert memory.mask(planned) == tokens**2


class Live(TorchDispatchMode):
    """Bytes of all storages that live, and the most that ever did."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return made


@pytest.mark.parametrize(
    "dtype, lora, autocast, tied",
    [
        (torch.float32, None, True, True),
        (torch.float32, None, False, False),
        (torch.bfloat16, None, False, False),
        (torch.bfloat16, LORA, True, False),
    ],
    ids=["full in autocast", "full in float32", "full in bfloat16", "lora in autocast"],
)
def test_the_plan_is_within_a_tenth_of_what_a_whole_step_holds(dtype, lora, autocast, tied, monkeypatch):
    """Two micro-batches, checkpointing, AdamW; the head's tiles are small, as for the GPU's they are beside a layer."""
    tile = 64
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", tile)
    monkeypatch.setattr(memory, "HEAD_TILE", (memory.HEAD_TILE[0], tile))
    tokens, length = 512, 128
    numbers = architecture(6, hidden_size=128, intermediate_size=384, vocab_size=1024, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**numbers), dtype=dtype, attn_implementation="sdpa")
    attach_head(model)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    if lora is not None:
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    zeros, own = np.zeros(length), np.arange(length) > 0
    sequences = [TrainSequence(np.arange(length), own, zeros, zeros, zeros, i, zeros) for i in range(tokens // length)]
    (batch,) = pack(sequences, max_tokens=tokens, row_tokens=1, pad_id=0)
    with Live([*model.parameters(), *model.buffers()]) as live:
        for _ in range(2):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logprobs, _ = token_logprobs(model, batch)
                logprobs.sum().backward()
                del logprobs, _
            optimizer.step()
            optimizer.zero_grad()
    planned = inputs(
        build_shape(numbers, lora=lora),
        weight_bytes=dtype.itemsize,
        compute_bytes=4 if dtype == torch.float32 and not autocast else 2,
        moment_bytes=4 if lora else dtype.itemsize,
        autocast=autocast,
        checkpointing=True,
        max_tokens=tokens,
    )
    parts = plan(planned).phases[1].parts
    total = sum(size for name, size in parts.items() if name not in ("reserve", "engine asleep"))
    assert 0.9 <= total / live.peak <= 1.1, parts


def test_qwen3_8b_is_counted_from_its_numbers():
    numbers = architecture(
        36,
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    shape = build_shape(numbers)
    assert shape.parameters == 8_190_735_360  # the model card: 8.2 B, 6.95 B without embeddings
    assert round((shape.parameters - 2 * 151936 * 4096) / 1e9, 2) == 6.95
    assert memory.kv_bytes_per_token(shape, 2) == 147_456
    zero3 = inputs(shape, strategy="zero3", gpus=8, weight_bytes=2, compute_bytes=2, master=True)
    states = memory.model_states(zero3)
    # ZeRO (arXiv 1910.02054 §5.4): 16 bytes a parameter over all ranks
    assert sum(states.values()) == 16 * shape.parameters // 8


@given(
    tokens=st.integers(64, 10**5),
    gpus=st.integers(1, 64),
    strategy=st.sampled_from(["zero1", "zero2", "zero3", "fsdp"]),
)
def test_sharding_divides_and_tokens_add(tokens, gpus, strategy):
    shape = Shape(64, 3, 128, 64, 4, 160, 256, True, parameters=200_001, layer_parameters=50_000)
    alone, cut = inputs(shape, max_tokens=tokens), inputs(shape, max_tokens=tokens, strategy=strategy, gpus=gpus)
    whole, parts = memory.model_states(alone), memory.model_states(cut)
    for name, size in whole.items():
        share = memory.shards(strategy, name, gpus)
        assert share in (1, gpus)
        assert size <= parts[name] * share < size + share
    more = replace(alone, max_tokens=tokens + 1)
    for part in (memory.kept_activations, memory.layer_work, memory.head_work):
        assert part(more) > part(alone)
    assert memory.kept_activations(replace(alone, checkpointing=True)) < memory.kept_activations(alone)


def test_a_shared_gpu_holds_both_in_rollouts_and_an_own_one_only_the_engine():
    shape = build_shape(architecture())
    shared = plan(inputs(shape, gpus=4))
    rollouts, training = shared.phases
    assert "optimizer" in rollouts.parts and "engine asleep" in training.parts
    own = plan(inputs(shape, gpus=4, engine=EnginePlan(4, 0.5, 256, 8, replicas=2, own_gpus=2)))
    rollouts, training = own.phases
    assert abs(rollouts.total - 40 * GIB) < 4 and "engine asleep" not in training.parts
    assert own.batch["engine replicas"] == 2 and shared.batch["engine replicas"] == 1


def test_states_are_cut_over_the_processes_that_train_wherever_they_are():
    shape = build_shape(architecture())
    cut = inputs(shape, strategy="zero3", gpus=4)
    for processes, engine in ((4, cut.engine), (2, replace(cut.engine, replicas=2, own_gpus=2))):
        alone = memory.model_states(inputs(shape))
        each = memory.model_states(replace(cut, engine=engine))
        assert each == memory.model_states(replace(cut, processes=processes))
        assert each == {name: -(-size // processes) for name, size in alone.items()}
    two_nodes = replace(cut, processes=8)
    assert batch_plan(two_nodes)["micro-batches an optimizer step and process, at most"] == 1


def test_replicas_play_as_many_episodes_as_they_have_places():
    shape = build_shape(architecture())
    for replicas, at_once in ((1, 8), (2, 16), (3, 16)):
        made = batch_plan(inputs(shape, gpus=4, engine=EnginePlan(4, 0.5, 256, 8, replicas=replicas)))
        assert made["episodes at once, at most"] == at_once


def test_adapters_need_no_second_model_as_reference():
    full = plan(inputs(build_shape(architecture()), reference=True)).phases[1].parts
    assert full["reference"] == full["weights"]
    assert "reference" not in plan(inputs(build_shape(architecture(), lora=LORA), reference=True)).phases[1].parts


@pytest.mark.parametrize(
    "prompts, samples, minibatches, gpus, rows", [(128, 8, 2, 8, 3), (5, 3, 2, 4, 1), (1, 2, 1, 8, 7)]
)
def test_micro_batches_hold_every_episode_at_full_length(prompts, samples, minibatches, gpus, rows):
    shape = Shape(64, 3, 128, 64, 4, 160, 256, True, parameters=200_000, layer_parameters=50_000)
    p = inputs(shape, prompts=prompts, samples=samples, minibatches=minibatches, gpus=gpus, max_tokens=rows * 256 + 255)
    made = batch_plan(p)
    room = made["micro-batches an optimizer step and process, at most"] * rows * gpus * minibatches
    assert room >= made["episodes a step"] == prompts * samples


def test_unplannable_models_are_refused():
    with pytest.raises(UserError, match=r"model\.architecture"):
        build_shape({"model_type": "no_such_model"})
    with pytest.raises(UserError, match="dense models only"):
        build_shape(architecture(model_type="qwen3_moe", num_experts=4))
