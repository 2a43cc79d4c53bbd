"""Lockstep: the same tokens and bit-equal log-probs whatever the tools' timing."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from rollout.engines import Sampling
from rollout.engines.lockstep import Lockstep
from rollout.errors import EngineDied, UserError, WaitTimeout
from tests.conftest import Loop

if TYPE_CHECKING:
    from rollout.engines.vllm_in_process import InProcessEngine

Turns = list[tuple[tuple[int, ...], tuple[float, ...]]]


async def program(engine: Any, name: str, index: int, delay: random.Random, turns: int) -> Turns:
    """A conversation whose next prompt depends on what was written, with tools of random length between turns."""
    ids, said = [index + 1, 7], []
    for turn in range(turns):
        sampling = Sampling(max_tokens=3 + (index + turn) % 5, seed=100 * index + turn)
        out = await engine.generate(ids, sampling, program_id=name)
        said.append((tuple(out.ids), tuple(out.logprobs)))
        await asyncio.sleep(delay.random() * 0.05)
        ids = ids + out.ids + [11]
    return said


async def play(lockstep: Lockstep, delay: random.Random) -> list[Turns]:
    names = [f"p{i}" for i in range(6)]
    for name in names:
        lockstep.enter(name)

    async def one(index: int, name: str) -> Turns:
        await asyncio.sleep(delay.random() * 0.05)
        try:
            return await program(lockstep, name, index, delay, turns=1 + index % 4)
        finally:
            lockstep.leave(name)

    return await asyncio.gather(*(one(i, name) for i, name in enumerate(names)))


def test_two_runs_are_bit_equal(vllm_engine: InProcessEngine, run: Loop, trainer_model: Any) -> None:
    from rollout.weights import named_weights

    runs = []
    for seed in range(3):  # a sync drops the prefix cache, so that each run starts from the same state
        run(vllm_engine.update_weights(named_weights(trainer_model), vllm_engine.version))
        runs.append(run(play(Lockstep(vllm_engine), random.Random(seed))))
    assert runs[0] == runs[1] == runs[2]


def test_all_wait_for_the_last_and_leaving_frees_them(vllm_engine: InProcessEngine, run: Loop) -> None:
    async def scenario() -> None:
        lockstep = Lockstep(vllm_engine)
        for name in "abc":
            lockstep.enter(name)
        a = asyncio.create_task(lockstep.generate([1], Sampling(max_tokens=2), program_id="a"))
        b = asyncio.create_task(lockstep.generate([2], Sampling(max_tokens=2), program_id="b"))
        await asyncio.sleep(0.2)
        assert not a.done() and not b.done()
        lockstep.leave("c")
        assert len((await a).ids) == len((await b).ids) == 2
        lockstep.leave("a")
        assert len((await lockstep.generate([2], Sampling(max_tokens=3), program_id="b")).ids) == 3
        lockstep.leave("b")
        lockstep.leave("b")

    run(scenario())


def test_a_program_that_never_comes_is_reported(
    vllm_engine: InProcessEngine, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        lockstep = Lockstep(vllm_engine)
        lockstep.enter("a")
        lockstep.enter("b")
        with pytest.raises(WaitTimeout, match="other programs"):
            await lockstep.generate([1], Sampling(max_tokens=2), program_id="a")
        lockstep.leave("b")  # a no longer waits: nothing may be submitted for it
        out = await lockstep.generate([1], Sampling(max_tokens=2), program_id="a")
        assert len(out.ids) == 2

    monkeypatch.setattr(vllm_engine.config, "timeout_s", 0.5)
    run(scenario())


def test_a_cancelled_program_frees_the_others(vllm_engine: InProcessEngine, run: Loop) -> None:
    async def scenario() -> None:
        lockstep = Lockstep(vllm_engine)
        for name in "abc":
            lockstep.enter(name)

        async def one(name: str) -> int:
            try:
                return len((await lockstep.generate([1], Sampling(max_tokens=2), program_id=name)).ids)
            finally:
                lockstep.leave(name)

        tasks = [asyncio.create_task(one(name)) for name in "ab"]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        lockstep.leave("c")
        assert await tasks[1] == 2
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    run(scenario())


def test_misuse_is_refused(vllm_engine: InProcessEngine, run: Loop) -> None:
    lockstep = Lockstep(vllm_engine)
    lockstep.enter("a")
    with pytest.raises(ValueError, match="entered already"):
        lockstep.enter("a")
    with pytest.raises(ValueError, match="has not entered"):
        run(lockstep.generate([1], Sampling(max_tokens=1), program_id="b"))
    with pytest.raises(UserError, match="empty prompt"):
        run(lockstep.generate([], Sampling(max_tokens=1), program_id="a"))
    assert lockstep.version == vllm_engine.version
    assert run(lockstep.score([1, 2, 3]))


def test_a_dead_engine_is_heard_by_all(model_dir: Any, run: Loop) -> None:
    from rollout.config import TransformersConfig
    from rollout.engines.transformers import build

    engine = build(TransformersConfig(), str(model_dir))
    run(engine.close())

    async def scenario() -> None:
        lockstep = Lockstep(engine)
        for name in "ab":
            lockstep.enter(name)
        calls = [lockstep.generate([1], Sampling(max_tokens=1), program_id=name) for name in "ab"]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [EngineDied, EngineDied]

    run(scenario())
