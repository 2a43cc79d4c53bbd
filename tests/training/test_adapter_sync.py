"""Adapters that travel alone: real engines answer with them, the gate sees a stale one, and runs train and go on."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rollout.config import VllmConfig
from rollout.engines import Engine, Generation, Sampling
from rollout.engines.adapter import adapter_arguments
from rollout.engines.vllm import build
from rollout.errors import UserError
from rollout.plots import read_jsonl
from rollout.weights import Probe, SyncMismatch, bound_for, model_logprobs, sync
from tests.training.launch import SMALL, context
from tests.training.test_chaos import start
from tests.training.test_run import run
from training.lora import adapter_folder, add_adapter, base_model, served_modules
from training.models import build_tiny, load_policy
from training.settings import LoraConfig

IDS = [[(3 * i + 5 * j) % 250 for j in range(40)] for i in range(3)]
PROMPT = [(7 * j) % 250 for j in range(70)]
RANK = 12  # vLLM has no such size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["1 + 2 = 3", "the quick brown fox jumps over the lazy dog"] * 4
    return build_tiny(tmp_path_factory.mktemp("base"), texts, hidden=64, mlp=96, heads=2, vocab=300)


def adapted(folder: Path) -> Any:
    model, _ = load_policy(folder)
    return add_adapter(model, LoraConfig(rank=RANK, alpha=24), None)


def move(model: Any, seed: int) -> None:
    """As a step of training does, but far: both factors of every adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))


class Scenario:
    """An engine on the base model, and a trainer whose adapter moves."""

    def __init__(self, folder: str, log: str, **settings: Any) -> None:
        self.model = adapted(Path(folder))
        self.probe = Probe(IDS, bound_for("float32"))
        extra = adapter_arguments(RANK, served_modules(self.model))
        config = VllmConfig(max_model_len=512, kv_cache_gib=0.1, timeout_s=120.0, extra=extra, **settings)
        self.engine: Engine = build(config, folder, log_path=Path(log))

    def logprobs(self, ids: list[list[int]]) -> list[list[float]]:
        return model_logprobs(base_model(self.model), ids)

    async def sync(self, version: int) -> float:
        with adapter_folder(self.model) as sent:
            return await sync(self.engine, sent, version, probe=self.probe, trainer_logprobs=self.logprobs)

    async def stale(self) -> str:
        """What the gate says of an engine that was not told of the last move."""
        try:
            await self.probe.check(self.engine, self.logprobs(IDS))
        except SyncMismatch as error:
            return str(error)
        return ""

    async def generate(self, tokens: int, prompt: list[int] = PROMPT) -> Generation:
        return await self.engine.generate(prompt, Sampling(max_tokens=tokens), program_id="p")

    def off(self, out: Generation, prompt: list[int], version: int) -> float:
        """How far the log-probs of this version's tokens are from the adapter as it is now."""
        own = self.logprobs([prompt + out.ids])[0][len(prompt) - 1 :]
        return max(abs(a - b) for a, b, v in zip(own, out.logprobs, out.versions, strict=True) if v == version)


def contract(*arguments: Any, **settings: Any) -> dict[str, Any]:
    """What every engine must do with adapters, measured."""
    scenario = Scenario(*arguments, **settings)
    found: dict[str, Any] = {}

    async def measure() -> None:
        move(scenario.model, 1)
        found["base"] = await scenario.stale()
        found["first"] = await scenario.sync(1)
        found["uncached"] = (await scenario.generate(1)).cached_tokens
        found["cached"] = (await scenario.generate(1)).cached_tokens
        long = asyncio.create_task(scenario.generate(420, [1, 2]))
        while (await scenario.engine.stats())["running"] == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        old = {name: value.clone() for name, value in scenario.model.state_dict().items()}
        move(scenario.model, 2)
        found["stale"] = await scenario.stale()
        found["second"] = await scenario.sync(2)
        found["after"] = (await scenario.generate(1)).cached_tokens
        out = await long
        found["versions"] = out.versions
        found["new tokens"] = scenario.off(out, [1, 2], 2)
        scenario.model.load_state_dict(old)
        found["old tokens"] = scenario.off(out, [1, 2], 1)

    async def whole() -> None:
        try:
            await measure()
        finally:
            await scenario.engine.close()

    asyncio.run(whole())
    return found


def keeping(*arguments: Any, **settings: Any) -> list[int]:
    """Prompt tokens from the cache, before and after an adapter has come in the place of another."""
    scenario = Scenario(*arguments, keep_cache=True, **settings)

    async def measure() -> list[int]:
        try:
            await scenario.sync(1)
            await scenario.generate(1)
            first = await scenario.generate(1)
            move(scenario.model, 1)
            await scenario.sync(2)
            return [first.cached_tokens, (await scenario.generate(1)).cached_tokens]
        finally:
            await scenario.engine.close()

    return asyncio.run(measure())


def in_child(function: Any, *arguments: Any, **settings: Any) -> Any:
    """In a process of its own: one can hold a single in-process engine, and the session's may live in this one."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(function, *arguments, **settings).result(300)


@pytest.mark.parametrize(
    "mode",
    ["in_process", pytest.param("process", marks=pytest.mark.slow), pytest.param("http", marks=pytest.mark.slow)],
)
def test_the_engine_answers_with_the_adapter_that_it_got_last(mode: str, folder: Path, tmp_path: Path) -> None:
    found = in_child(contract, str(folder), str(tmp_path / "engine.log"), mode=mode, restarts=0)
    assert "above the bound" in found["base"] and "above the bound" in found["stale"]
    assert found["first"] < 1e-5 > found["second"]
    assert (found["uncached"], found["cached"], found["after"]) == (0, 64, 0), "KV of the old adapter is gone"
    assert found["versions"] == sorted(found["versions"]) and set(found["versions"]) == {1, 2}
    assert found["old tokens"] < 1e-4 > found["new tokens"], "each token is of the adapter that it is stamped with"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["process", "http"])
def test_a_kept_cache_outlives_the_adapter(mode: str, folder: Path, tmp_path: Path) -> None:
    assert in_child(keeping, str(folder), str(tmp_path / "engine.log"), mode=mode, restarts=0) == [64, 64]


@pytest.mark.slow
def test_an_engine_that_is_started_anew_has_the_adapter(folder: Path, tmp_path: Path) -> None:
    scenario = Scenario(str(folder), str(tmp_path / "engine.log"), mode="process", replicas=2, restarts=1)

    async def measure() -> tuple[list[list[float]], Generation]:
        move(scenario.model, 1)
        await scenario.sync(1)
        cores = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()]
        os.kill(cores[0].pid, signal.SIGKILL)
        with pytest.raises(SyncMismatch):
            move(scenario.model, 2)
            await scenario.probe.check(scenario.engine, scenario.logprobs(IDS))
        move(scenario.model, 3)
        await scenario.sync(2)
        os.kill(cores[1].pid, signal.SIGKILL)
        replies = await scenario.engine.score_each(IDS[0])  # type: ignore[attr-defined]
        assert (await scenario.engine.stats())["restarts"] == 2
        return replies, await scenario.generate(8)

    async def whole() -> tuple[list[list[float]], Generation]:
        try:
            return await measure()
        finally:
            await scenario.engine.close()

    replies, out = asyncio.run(whole())
    (expected,) = scenario.logprobs(IDS[:1])
    for reply in replies:
        assert max(abs(a - b) for a, b in zip(reply, expected, strict=True)) < 1e-4
    assert set(out.versions) == {2}


ADAPTER = ["lora=lora", "lora.rank=4", "lora.sync=adapter", "optimizer.learning_rate=0.01"]


def trained(run_dir: Path, *overrides: str, resume: bool = False) -> None:
    settings = [*SMALL, *ADAPTER, *overrides, f"resume={str(resume).lower()}", f"run_dir={run_dir}"]
    code, text = run(settings, run_dir.with_suffix(".log"))
    assert code == 0, text[-3000:]


def checked(run_dir: Path, steps: int) -> None:
    """Every sync passed, and there was something to send."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["sync/difference"] < 1e-4 and row["policy/mismatch_max"] < 1e-3 for row in rows)
    folders = run_dir / "model", run_dir / "checkpoints" / f"step-{steps}"
    start, end = (model_logprobs(load_policy(folder)[0], IDS[:1])[0] for folder in folders)
    assert max(abs(a - b) for a, b in zip(start, end, strict=True)) > 0.01


def test_a_run_that_sends_adapters_alone_resumes_to_the_same_bits(tmp_path: Path) -> None:
    exact = "engine.deterministic=true", "checkpoint.every=2", "optimizer.lr_scheduler_type=constant"
    trained(tmp_path / "whole", *exact, "steps=4")
    trained(tmp_path / "parts", *exact, "steps=2")
    trained(tmp_path / "parts", *exact, "steps=4", resume=True)
    checked(tmp_path / "parts", 4)
    whole, parts = (tmp_path / name / "checkpoints" / "step-4" for name in ("whole", "parts"))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_with_an_engine_of_its_own_goes_on(tmp_path: Path) -> None:
    settings = "engine=vllm_process", "engine.kv_cache_gib=0.1", "checkpoint.every=2"
    trained(tmp_path / "run", *settings, "steps=2")
    trained(tmp_path / "run", *settings, "steps=4", resume=True)
    checked(tmp_path / "run", 4)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("sharding", "way"), [("zero3", "adapter"), ("fsdp2", "adapter"), ("fsdp2", "merged")])
def test_what_two_processes_hold_in_parts_arrives_whole(sharding: str, way: str, tmp_path: Path) -> None:
    engine = ["engine=vllm_process", "engine.max_num_seqs=8", "engine.kv_cache_gib=0.1"]
    settings = [*SMALL, *ADAPTER, *engine, f"lora.sync={way}", f"sharding={sharding}", "steps=2"]
    process = start([*settings, f"run_dir={tmp_path / 'run'}"], tmp_path / "log", processes=2)
    assert process.wait(350) == 0, (tmp_path / "log").read_text()[-3000:]
    checked(tmp_path / "run", 2)


def test_layers_that_no_engine_computes_are_refused_before_it_starts(tmp_path: Path) -> None:
    overrides = [*SMALL, *ADAPTER, "lora.target_modules='.*(q_proj|embed_tokens)'", f"run_dir={tmp_path / 'run'}"]
    code, text = run([*overrides, "steps=1"], tmp_path / "log")
    assert code == 2
    last = text.splitlines()[-1]
    assert last.startswith("error: lora.target_modules: embed_tokens cannot") and "lora.sync=merged" in last


def test_heads_are_refused_and_linear_layers_are_named_once(folder: Path) -> None:
    assert served_modules(adapted(folder)) == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    model, _ = load_policy(folder)
    with pytest.raises(UserError, match=r"lora\.target_modules: lm_head cannot .*; name linear layers"):
        served_modules(add_adapter(model, LoraConfig(target_modules=".*(q_proj|lm_head)"), None))
