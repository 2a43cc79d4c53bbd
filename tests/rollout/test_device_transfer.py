"""Weights by vLLM's own transfer: its real NCCL and CUDA IPC engines on both sides, with CUDA itself played on CPU."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rollout.config import TransformersConfig, VllmConfig
from rollout.engines import Generation, Sampling
from rollout.engines.device_transfer import check_transfer
from rollout.engines.vllm import build, engine_arguments
from rollout.errors import EngineDied, UserError
from rollout.weights import Probe, bound_for, model_logprobs, sync
from tests.conftest import Loop, load_model

IDS = [[(3 * i + 5 * j) % 500 for j in range(48)] for i in range(3)]
CHUNK = 2**18  # as large as the test model's embedding: about eight chunks in all
VERSIONS = (1, 2)


def settings(**changes: Any) -> VllmConfig:
    extra = {"worker_extension_cls": "tests.rollout.cuda_worker.Extension"}
    usual = {"mode": "process", "max_model_len": 512, "kv_cache_gib": 0.1, "timeout_s": 120.0, "restarts": 0}
    return VllmConfig(**{**usual, "extra": extra, **changes})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """CUDA's stand-in in this process, which is the trainer's rank 0 on GPU 0 of two, and small chunks."""
    from rollout.engines import vllm_sender
    from tests.rollout.cuda_stand_in import SHARED, StoreCommunicator, stand_in

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")  # and back again: an engine in a process sets it
    monkeypatch.setattr(vllm_sender, "CHUNK_BYTES", CHUNK)
    stand_in(monkeypatch.setattr, "GPU-0")
    StoreCommunicator.sent.clear()
    SHARED.clear()
    return monkeypatch


def moved(model: Any, seed: int) -> Any:
    """The model after a step that shows in its log-probs, of which each process takes its own part."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mine = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            mine.add_(torch.randn_like(mine), alpha=0.02)
    return model


def synced(engine: Any, model: Any, version: int) -> Any:
    """The weight sync of a training step, with its gate."""
    from training.policy_weights import PolicyWeights

    return sync(
        engine,
        PolicyWeights(model),
        version,
        probe=Probe(IDS, bound_for("float32")),
        trainer_logprobs=lambda ids: model_logprobs(model, ids),
    )


def sharded(model_dir: Path, meeting: str, rank: int) -> Any:
    """The model, spread by FSDP2 over a trainer of two processes, of which this is one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    return fully_shard(load_model(model_dir), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)


def follow(model_dir: Path, meeting: str, transfer: str) -> None:
    """Rank 1, in a process of its own and on a GPU of its own: its part in each sync."""
    import torch.distributed as dist

    from rollout.engines import vllm_sender
    from tests.rollout.cuda_stand_in import stand_in
    from training.engine_sync import EngineSync
    from training.ranks import Ranks

    stand_in(setattr, "GPU-1")
    vllm_sender.CHUNK_BYTES = CHUNK
    model = sharded(model_dir, meeting, 1)
    engine = SimpleNamespace(dtype="float32", timeout_s=120.0, transfer=transfer)
    parts = {"probe": SimpleNamespace(bound=None), "model": SimpleNamespace(dtype="float32"), "engine": engine}
    cfg = SimpleNamespace(**parts, sends_adapter=False)
    part = EngineSync(cfg, Ranks(), None, None, model, IDS)
    for version in VERSIONS:
        moved(model, version)
        assert part(version) == version
    dist.destroy_process_group()


@pytest.mark.parametrize("transfer", ["nccl", pytest.param("ipc", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["process", pytest.param("http", marks=pytest.mark.slow)])
def test_a_sharded_trainer_brings_every_engine_to_its_weights(
    transfer: str, mode: str, cuda: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, run: Loop
) -> None:
    """Each update arrives whole, is stamped on what is written from then on, and empties the prefix cache.

    By ipc the second engine, on GPU 1, can have it from the trainer's rank 1 alone.
    """
    import torch.distributed as dist

    from tests.rollout.cuda_stand_in import StoreCommunicator

    ids = [(7 * i + 1) % 499 for i in range(100)]
    config = settings(mode=mode, transfer=transfer, replicas=2, devices=[0, 1])
    fleet = build(config, str(model_dir), log_path=tmp_path / "engine.log")
    meeting = f"file://{tmp_path / 'meeting'}"
    other = multiprocessing.get_context("spawn").Process(target=follow, args=(model_dir, meeting, transfer))
    other.start()

    async def while_it_writes(model: Any, version: int) -> Generation:
        long = asyncio.create_task(fleet.generate([1, 2], Sampling(max_tokens=400), program_id="long"))
        await asyncio.sleep(0.3)
        assert await synced(fleet, model, version) < 1e-5
        return await long

    try:
        model = sharded(model_dir, meeting, 0)
        for version in VERSIONS:
            run(fleet.generate(ids, Sampling(max_tokens=1), program_id="p"))
            running = run(while_it_writes(moved(model, version), version))
            after = run(fleet.generate(ids, Sampling(max_tokens=4), program_id="p"))
            assert (after.cached_tokens, set(after.versions), fleet.version) == (0, {version}, version)
            assert running.versions == sorted(running.versions) and set(running.versions) == {version - 1, version}
        other.join(30)
        assert other.exitcode == 0
        if transfer == "nccl":
            assert len(StoreCommunicator.sent) >= 5 * len(VERSIONS), "no chunk holds the model"
            assert max(StoreCommunicator.sent) <= 2 * CHUNK
    finally:
        other.kill()
        run(fleet.close())
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_death_during_a_broadcast_is_reported_though_nccl_waits_on(
    cuda: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, run: Loop, trainer_model: Any
) -> None:
    from tests.rollout.cuda_stand_in import StoreCommunicator

    sending, over = threading.Event(), threading.Event()

    def broadcast(*arguments: Any, **keywords: Any) -> None:
        sending.set()
        over.wait(60)

    engine = build(settings(transfer="nccl"), str(model_dir), log_path=tmp_path / "engine.log")
    (core,) = engine._llm.engine_core.resources.engine_manager.processes

    async def killed() -> float:
        update = asyncio.create_task(synced(engine, trainer_model, 2))
        await asyncio.to_thread(sending.wait, 60)
        start = time.monotonic()
        psutil.Process(core.pid).kill()
        with pytest.raises(EngineDied, match="the vLLM engine died"):
            await update
        return time.monotonic() - start

    try:
        run(synced(engine, trainer_model, 1))
        cuda.setattr(StoreCommunicator, "broadcast", broadcast)
        assert run(killed()) < 10
    finally:
        over.set()
        run(engine.close())


def test_a_chunk_holds_the_largest_weight(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rollout.engines import vllm_sender
    from training.policy_weights import PolicyWeights

    weights = PolicyWeights(load_model(model_dir))
    largest = max(tensor.nbytes for _, tensor in weights)
    monkeypatch.setattr(vllm_sender, "CHUNK_BYTES", 1000)
    assert vllm_sender.ipc_info(3, weights).packed_buffer_size_bytes == largest
    assert not vllm_sender.ipc_info(3, weights).is_sender
    monkeypatch.undo()
    assert vllm_sender.nccl_info(None, 4, weights).packed_buffer_size_bytes == 2**30 > largest


def test_engines_on_other_machines_are_met_at_an_address_that_they_reach(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rollout.engines import vllm_sender
    from training.policy_weights import PolicyWeights

    weights = PolicyWeights(load_model(model_dir))
    monkeypatch.setattr(vllm_sender, "get_ip", lambda: "10.0.0.1")
    for url, address in ((None, "127.0.0.1"), ("http://localhost:8000", "127.0.0.1"), ("http://far:8000", "10.0.0.1")):
        info = vllm_sender.nccl_info(url, 4, weights)
        assert (info.master_address, info.world_size, info.is_sender) == (address, 5, True)


def test_the_engine_is_started_with_vllms_back_end(model_dir: Path) -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
    from vllm.engine.arg_utils import EngineArgs

    for transfer in ("nccl", "ipc"):
        arguments = engine_arguments(settings(transfer=transfer, extra={}), str(model_dir))
        config = EngineArgs(**arguments).weight_transfer_config
        assert config.backend == transfer
        assert transfer in WeightTransferEngineFactory._registry
        assert transfer in WeightTransferTrainerFactory._registry


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": "rdma"}, "engine.transfer: 'rdma' is not one of file, nccl, ipc"),
        ({"transfer": "nccl", "mode": "in_process"}, "engine.transfer: nccl is for engines in processes of their own"),
        ({"transfer": "ipc", "restarts": 3}, "engine.restarts: engine.transfer=ipc keeps no copy .*; give 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)
    with pytest.raises(UserError, match=r"engine\.transfer: nccl is vLLM's; take engine=vllm_process"):
        TransformersConfig(transfer="nccl")


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (4, {"transfer": "nccl"}, r"nccl is for engines with GPUs of their own, and \[0\] are trained on; name others"),
        (4, {"transfer": "nccl", "devices": [3, 4]}, r"and \[3\] are trained on"),
        (4, {"transfer": "nccl", "devices": [4, 5], "replicas": 2}, None),
        (4, {"transfer": "nccl", "mode": "http", "url": "http://far:8000"}, None),
        (4, {"transfer": "ipc", "devices": [3, 4]}, r"ipc is for engines on the trainer's GPUs, and \[4\] are not"),
        (4, {"transfer": "ipc", "tensor_parallel_size": 4}, None),
        (1, {"transfer": "file", "devices": [7]}, None),
    ],
)
def test_engines_and_trainer_share_gpus_for_ipc_and_only_then(
    ranks: int, changes: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if message is None:
        check_transfer(settings(**changes))
    else:
        with pytest.raises(UserError, match=message):
            check_transfer(settings(**changes))


def test_without_cuda_it_is_refused_before_anything_starts(tmp_path: Path) -> None:
    refusal = "engine.transfer: nccl needs CUDA, and this machine has none; take engine.transfer=file"
    overrides = ["engine=vllm_process", "engine.transfer=nccl", "engine.restarts=0", f"run_dir={tmp_path / 'run'}"]
    line = [sys.executable, "-m", "training", "experiment=quickstart", *overrides]
    answered = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert (answered.returncode, answered.stderr.strip()) == (2, f"error: {refusal}")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not list(tmp_path.rglob("metrics.jsonl"))
