"""A critic in two data-parallel processes, or under DeepSpeed's ZeRO, learns what a plain one learns.

accelerate counts one process where DeepSpeed runs on CPUs, so that ZeRO is tested with one. Not run on GPU.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.launch import context
from training.critic import Critic, make_critic
from training.members import ValueModelConfig
from training.models import build_tiny, load_policy
from training.packing import MicroBatch, TrainSequence, pack
from training.settings import OptimizerConfig
from training.values import load_value_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=1)
# Sequences of each step, by process where there are two: uneven, one process without any, and the other
STEPS = [([0, 1, 2, 3], [4, 5]), ([0, 1, 2], []), ([], [3, 4, 5]), ([1, 3, 5], [0, 2, 4])]


def sequences(step: int) -> list[TrainSequence]:
    from tests.training.test_critic import sequences

    return sequences(seed=step)


def packed(given: list[TrainSequence]) -> list[MicroBatch]:
    return pack(given, max_tokens=17, row_tokens=1, pad_id=0)


def critic_in(folder: Path, deepspeed: dict[str, Any] | None, resume: Path | None = None) -> Critic:
    """As the loop makes it: with the accelerator and the arguments of a real trainer on the policy."""
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(1)
    model, tokenizer = load_policy(folder / "policy")
    options = {"output_dir": str(folder / "out"), "per_device_train_batch_size": 1, "report_to": []}
    # With use_cpu accelerate knows no DeepSpeed; without a GPU the device is the CPU anyway.
    arguments = TrainingArguments(**options, use_cpu=deepspeed is None, deepspeed=deepspeed)
    trainer = Trainer(model=model, args=arguments)
    config = ValueModelConfig(path=str(folder / "values"), optimizer=OPTIMIZER)
    return make_critic(
        config, folder / "policy", tokenizer, arguments, trainer.accelerator, total_steps=20, resume=resume
    )


def shares(size: int) -> list[list[list[int]]]:
    """By process, the sequences of each step."""
    return [[[i for part in parts[rank::size] for i in part] for parts in STEPS] for rank in range(size)]


def process(rank: int, size: int, port: int, folder: Path, deepspeed: dict[str, Any] | None, log: Path) -> None:
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        critic = critic_in(folder, deepspeed)
        mine = [[sequences(step)[i] for i in part] for step, part in enumerate(shares(size)[rank])]
        rows: list[Any] = [[v.tolist() for v in critic.values(packed(part))] for part in mine]
        for part in mine[:3]:
            rows.append(critic.step(packed(part)))
        rows.append(critic.step([]))
        critic.save(folder / "step-3")
        rows.append(critic.step(packed(mine[3])))
        critic.save(folder / "step-4")
        torch.distributed.barrier()
        later = critic_in(folder, deepspeed, folder / "step-3")
        rows.append(later.step(packed(mine[3])))
        later.save(folder / "again")
        torch.distributed.barrier()
        log.write_text(json.dumps(rows))
        torch.distributed.destroy_process_group()
    except BaseException:
        log.with_suffix(".error").write_text(traceback.format_exc())
        raise


def zero(stage: int) -> dict[str, Any]:
    gathers = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto")
    return {**auto, "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": stage, **gathers}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a value model with something to say, and what one process makes of it."""
    root = tmp_path_factory.mktemp("critic")
    build_tiny(root / "policy", ["1 + 2 = 3"] * 4, hidden=32, mlp=48, heads=2, head_dim=16)
    model, tokenizer = load_value_model(root / "policy"), load_policy(root / "policy")[1]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(root / "values")
    tokenizer.save_pretrained(root / "values")
    return root


@pytest.mark.parametrize(
    ("size", "deepspeed"), [(2, None), (1, zero(1)), (1, zero(3))], ids=["replicated", "zero1", "zero3"]
)
def test_it_learns_what_a_plain_critic_does(
    folder: Path, tmp_path: Path, size: int, deepspeed: dict[str, Any] | None
) -> None:
    for name in ("policy", "values"):
        (tmp_path / name).symlink_to(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [tmp_path / f"{rank}.json" for rank in range(size)]
    processes = [
        context().Process(target=process, args=(rank, size, port, tmp_path, deepspeed, log))
        for rank, log in enumerate(logs)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(500)
        if each.exitcode is None:
            each.kill()
    errors = [file.read_text() for file in tmp_path.glob("*.error")]
    assert [each.exitcode for each in processes] == [0] * size, errors
    every = [json.loads(log.read_text()) for log in logs]

    alone = critic_in(folder, None)
    for rank, parts in enumerate(shares(size)):
        for step, part in enumerate(parts):
            expected = alone.values(packed([sequences(step)[i] for i in part]))
            assert len(expected) == len(every[rank][step])
            for got, values in zip(every[rank][step], expected, strict=True):
                torch.testing.assert_close(torch.tensor(got), values, rtol=1e-4, atol=1e-5)
    rows = [alone.step(packed([sequences(s)[i] for part in parts for i in part])) for s, parts in enumerate(STEPS)]
    for results in every:
        *stepped, skipped, last, resumed = results[len(STEPS) :]
        assert skipped == {}
        assert last == resumed, "a saved critic goes on as the other"
        for got, wanted in zip([*stepped, last], rows, strict=True):
            assert got == pytest.approx(wanted, rel=1e-2, abs=1e-3)
    wholes = [load_file(tmp_path / name / "critic" / "model.safetensors") for name in ("step-4", "again")]
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(wholes[0][name], value, rtol=1e-2, atol=2e-3)
        assert torch.equal(wholes[0][name], wholes[1][name])
