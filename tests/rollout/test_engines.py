"""One contract for every engine member, at temperature 0.7, against a plain forward pass of the trainer's model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollout.config import PROGRAM_SCHEDULER, TransformersConfig, VllmConfig
from rollout.engines import Engine, Generation, Sampling
from rollout.engines import transformers as transformers_engine
from rollout.engines import vllm as vllm_engines
from rollout.errors import EngineDied, UserError, WaitTimeout
from rollout.scheduling.files import NUMBERS
from rollout.scheduling.metrics import Snapshot, read_snapshot
from rollout.weights import model_logprobs, named_weights
from tests.conftest import Loop

MEMBERS = ("in_process", "process", "http", "transformers")
MAX_LEN = 512


@pytest.fixture(scope="session", params=MEMBERS)
def engine(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory, run: Loop
) -> Iterator[Engine]:
    """Each member, started once for all tests of this file."""
    if request.param == "in_process":
        yield request.getfixturevalue("vllm_engine")
        return
    log_path = tmp_path_factory.mktemp(request.param) / "engine.log"
    if request.param == "transformers":
        member = transformers_engine.build(TransformersConfig(max_model_len=MAX_LEN, timeout_s=60.0), str(model_dir))
    else:
        # These two run our scheduler, that in this process stock vLLM's: the contract is the same.
        options = {"turnstile": {"policy": "turnstile", "metrics_path": str(log_path.with_name(NUMBERS))}}
        config = VllmConfig(
            mode=request.param,
            max_model_len=MAX_LEN,
            kv_cache_gib=0.25,
            timeout_s=120.0,
            restarts=0,  # the engine itself, not one that is started anew
            scheduler_cls=PROGRAM_SCHEDULER,
            scheduler_options=options,
        )
        member = vllm_engines.build(config, str(model_dir), log_path=log_path)
    yield member
    run(member.close())


def prompts(count: int, length: int = 12) -> list[list[int]]:
    return [[(7 * i + 13 * j) % 500 for j in range(length)] for i in range(count)]


def generate(engine: Engine, run: Loop, ids: list[int], sampling: Sampling, program: str = "p") -> Generation:
    return run(engine.generate(ids, sampling, program_id=program))


def own_logprobs(model: Any, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
    """log-softmax(logits / temperature) of the sampled tokens."""
    import torch

    tokens = torch.tensor([prompt + ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, tokens[0, len(prompt) :, None])[:, 0].tolist()


def furthest(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_logprobs_are_those_of_the_sampled_distribution(engine: Engine, run: Loop, trainer_model: Any) -> None:
    async def many() -> list[Generation]:
        sampling = Sampling(max_tokens=24, temperature=0.7)
        calls = (engine.generate(ids, sampling, program_id=f"p{i}") for i, ids in enumerate(prompts(16)))
        return await asyncio.gather(*calls)

    for prompt, out in zip(prompts(16), run(many()), strict=True):
        assert len(out.ids) == len(out.logprobs) == len(out.versions) == 24
        assert out.finish == "length"
        assert set(out.versions) == {engine.version}
        assert isinstance(out.cached_tokens, int)
        assert furthest(out.logprobs, own_logprobs(trainer_model, prompt, out.ids, 0.7)) < 1e-4


def test_greedy_is_the_trainers_argmax(engine: Engine, run: Loop, trainer_model: Any) -> None:
    import torch

    (prompt,) = prompts(1)
    out = generate(engine, run, prompt, Sampling(max_tokens=16, temperature=0.0))
    with torch.no_grad():
        logits = trainer_model(torch.tensor([prompt + out.ids])).logits[0, len(prompt) - 1 : -1]
    assert out.ids == logits.argmax(-1).tolist()
    assert furthest(out.logprobs, own_logprobs(trainer_model, prompt, out.ids, 1.0)) < 1e-4


def test_stop_ids_end_a_generation_and_are_kept(engine: Engine, run: Loop) -> None:
    (prompt,) = prompts(1)
    free = generate(engine, run, prompt, Sampling(max_tokens=16, temperature=0.0))
    stop = free.ids[5]
    out = generate(engine, run, prompt, Sampling(max_tokens=16, temperature=0.0, stop_token_ids=(stop,)))
    assert out.finish == "stop"
    assert out.ids == free.ids[: free.ids.index(stop) + 1]
    assert len(out.logprobs) == len(out.ids)


def test_score_is_the_trainers(engine: Engine, run: Loop, trainer_model: Any) -> None:
    sequences = prompts(4, length=40)

    async def score() -> list[list[float]]:
        return await asyncio.gather(*(engine.score(ids) for ids in sequences))

    for ours, theirs in zip(run(score()), model_logprobs(trainer_model, sequences), strict=True):
        assert furthest(ours, theirs) < 1e-4


def test_generation_ends_at_the_context_and_bad_prompts_are_refused(engine: Engine, run: Loop) -> None:
    out = generate(engine, run, prompts(1, MAX_LEN - 3)[0], Sampling(max_tokens=50))
    assert (len(out.ids), out.finish) == (3, "length")
    for bad in ([], prompts(1, MAX_LEN)[0], [1, 10_000]):
        with pytest.raises(UserError):
            generate(engine, run, bad, Sampling(max_tokens=1))
    run(engine.health())


def test_repeated_prefixes_come_from_the_cache(engine: Engine, run: Loop) -> None:
    ids = [(5 * i + 3) % 499 for i in range(100)]
    generate(engine, run, ids, Sampling(max_tokens=1))
    again = generate(engine, run, ids, Sampling(max_tokens=1))
    assert again.cached_tokens == (0 if isinstance(engine, transformers_engine.TransformersEngine) else 96)


def test_update_weights(engine: Engine, run: Loop, trainer_model: Any) -> None:
    import torch

    (ids,) = prompts(1, length=64)
    before = model_logprobs(trainer_model, [ids])[0]
    generate(engine, run, ids, Sampling(max_tokens=1))  # its prefix is cached now
    old = {name: tensor.clone() for name, tensor in named_weights(trainer_model)}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    version = engine.version + 1
    try:
        run(engine.update_weights(named_weights(trainer_model), version))
        assert engine.version == version
        after = model_logprobs(trainer_model, [ids])[0]
        assert furthest(before, after) > 0.1
        out = generate(engine, run, ids, Sampling(max_tokens=16, temperature=0.7))
        assert out.cached_tokens == 0  # the prefix of the old weights is gone
        assert set(out.versions) == {version}
        assert furthest(out.logprobs, own_logprobs(trainer_model, ids, out.ids, 0.7)) < 1e-4
        assert furthest(run(engine.score(ids)), after) < 1e-4
    finally:
        run(engine.update_weights(old.items(), version + 1))
    assert furthest(run(engine.score(ids)), before) < 1e-4


def test_weights_that_change_mid_generation_are_stamped(engine: Engine, run: Loop, trainer_model: Any) -> None:
    version = engine.version

    async def scenario() -> Generation:
        task = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=400), program_id="long"))
        await asyncio.sleep(0.15)
        await engine.pause("keep")
        await engine.update_weights(named_weights(trainer_model), version + 1)
        assert not task.done()
        await engine.resume()
        return await task

    out = run(scenario())
    assert out.versions == sorted(out.versions)
    assert set(out.versions) == {version, version + 1}
    assert len(out.versions) == len(out.ids) == 400


def test_abort_gives_what_was_written(engine: Engine, run: Loop) -> None:
    async def scenario() -> tuple[Generation, Generation]:
        one = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=450), program_id="one"))
        other = asyncio.create_task(engine.generate([1, 3], Sampling(max_tokens=60), program_id="other"))
        await asyncio.sleep(0.15)
        await engine.abort("one")
        return await one, await other

    one, other = run(scenario())
    assert one.finish == "abort"
    assert 0 < len(one.ids) == len(one.logprobs) == len(one.versions) < 450
    assert (other.finish, len(other.ids)) == ("length", 60)
    run(engine.abort("nobody"))


def test_pause(engine: Engine, run: Loop) -> None:
    async def scenario(mode: Any) -> tuple[bool, Generation, Generation]:
        running = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=200), program_id="a"))
        await asyncio.sleep(0.1)
        await engine.pause(mode)
        late = asyncio.create_task(engine.generate([1, 3], Sampling(max_tokens=4), program_id="b"))
        await asyncio.sleep(0.2)
        assert not late.done()
        ended = running.done()
        await engine.resume()
        return ended, await running, await late

    for mode, ended, finish in (("wait", True, "length"), ("abort", True, "abort"), ("keep", False, "length")):
        done, running, late = run(scenario(mode))
        assert (done, running.finish, late.finish) == (ended, finish, "length"), mode


def test_sleep_and_wake(engine: Engine, run: Loop) -> None:
    run(engine.sleep(1))
    run(engine.wake())
    assert len(generate(engine, run, [1, 2, 3], Sampling(max_tokens=4)).ids) == 4


def test_waits_end_and_leave_the_engine_usable(engine: Engine, run: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.config, "timeout_s", 0.1)
        with pytest.raises(WaitTimeout, match=r"waited 0\.1 s for .* up to 450 tokens"):
            generate(engine, run, [1, 2], Sampling(max_tokens=450))
    stats = run(engine.stats())
    assert stats["requests"] > 0 and stats["generated_tokens"] > 0
    deadline = time.monotonic() + 5
    while run(engine.stats())["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run(engine.stats())["running"] == 0


def test_any_event_loop_may_call(engine: Engine) -> None:
    out = asyncio.run(engine.generate([1, 2, 3], Sampling(max_tokens=3), program_id="elsewhere"))
    assert len(out.ids) == 3


def test_seeds_make_tokens_independent_of_the_batch(engine: Engine, run: Loop) -> None:
    if isinstance(engine, transformers_engine.TransformersEngine):
        pytest.skip("continuous batching has no seeds")

    async def crowd(size: int) -> list[int]:
        calls = (engine.generate([9, i], Sampling(max_tokens=20, seed=i), program_id=str(i)) for i in range(size))
        return (await asyncio.gather(*calls))[0].ids

    assert run(crowd(1)) == run(crowd(8))


def test_other_samplers_are_refused_where_they_do_not_exist(engine: Engine, run: Loop) -> None:
    if not isinstance(engine, transformers_engine.TransformersEngine):
        out = generate(engine, run, [1, 2], Sampling(max_tokens=8, top_p=0.5, top_k=3))
        assert len(out.ids) == 8
        return
    with pytest.raises(UserError, match=r"sampling\.top_p"):
        generate(engine, run, [1, 2], Sampling(max_tokens=8, top_p=0.5))


ODD_NAMES = ("plain", "a/b", "a/b/release", "ü€ ß", "..", "x?y=1#z", "%41%2F", "a\\b", '"q"', "n" * 256)
NO_NAMES = ("", "line\nbreak", "n" * 257)


def snapshot(engine: Engine, run: Loop) -> Snapshot | None:
    """Our scheduler's numbers of now: they are published when a request ends, at most once a second."""
    time.sleep(1.0)
    generate(engine, run, [1, 2], Sampling(max_tokens=2), program="")
    return read_snapshot(engine.log_path.with_name(NUMBERS)) if isinstance(engine, vllm_engines_remote()) else None


def test_release_reaches_the_scheduler_whatever_the_name(engine: Engine, run: Loop) -> None:
    """KV is kept for every program that has a name, and let go by exactly that name."""
    (ids,) = prompts(1, length=80)
    before = snapshot(engine, run)
    for name in (*ODD_NAMES, *NO_NAMES):
        generate(engine, run, ids, Sampling(max_tokens=2), program=name)
    kept = snapshot(engine, run)
    for name in (*ODD_NAMES, *NO_NAMES, "never seen"):
        run(engine.release(name))
    after = snapshot(engine, run)
    if before is None or kept is None or after is None:  # a scheduler that keeps nothing
        return
    assert kept.counters["programs"] - before.counters["programs"] == len(ODD_NAMES)
    assert kept.gauges["pins_now"] - before.gauges["pins_now"] == len(ODD_NAMES)
    assert after.drops["release"] - kept.drops["release"] == len(ODD_NAMES)
    assert after.gauges["pins_now"] == before.gauges["pins_now"]


def test_new_weights_drop_what_was_kept(engine: Engine, run: Loop, trainer_model: Any) -> None:
    if not isinstance(engine, vllm_engines_remote()):
        pytest.skip("stock vLLM keeps nothing")
    generate(engine, run, *prompts(1, length=80), Sampling(max_tokens=2), program="kept")
    kept = snapshot(engine, run)
    run(engine.update_weights(named_weights(trainer_model), engine.version + 1))
    after = snapshot(engine, run)
    assert kept.gauges["pins_now"] > after.gauges["pins_now"] == 0
    dropped = sum(after.drops.values()) - sum(kept.drops.values())
    assert dropped == after.drops["pause"] - kept.drops["pause"] == kept.gauges["pins_now"]


def test_a_running_server_can_be_joined(engine: Engine, run: Loop, model_dir: Path) -> None:
    from rollout.engines.vllm_http import HttpEngine

    if not isinstance(engine, HttpEngine):
        pytest.skip("not a server")
    guest = vllm_engines.build(VllmConfig(mode="http", url=engine.url, max_model_len=MAX_LEN), str(model_dir))
    assert guest.version == engine.version
    assert generate(guest, run, [1, 2], Sampling(max_tokens=2)).versions == [engine.version] * 2
    run(guest.release("p"))
    run(guest.close())
    run(engine.health())


def test_zz_a_killed_engine_is_reported_within_seconds(engine: Engine, run: Loop) -> None:
    """Last of all: SIGKILL the engine's processes while it generates."""
    if not isinstance(engine, vllm_engines_remote()):
        pytest.skip("lives in this process")
    family = psutil.Process().children(recursive=True)  # other tests keep processes of their own
    core = [p for p in family if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline())]
    assert core
    children = [*core, *(p for p in family if core[0] in p.children())]

    async def scenario() -> float:
        task = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=450), program_id="a"))
        await asyncio.sleep(0.2)
        start = time.monotonic()
        core[0].kill()
        with pytest.raises(EngineDied):
            await task
        with pytest.raises(EngineDied):
            await engine.generate([1, 2], Sampling(max_tokens=4), program_id="b")
        with pytest.raises(EngineDied):
            await engine.health()
        with pytest.raises(EngineDied):
            await engine.update_weights([], 99)
        return time.monotonic() - start

    assert run(scenario()) < 10
    run(engine.close())
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


def vllm_engines_remote() -> type:
    from rollout.engines.remote import RemoteEngine

    return RemoteEngine


def test_a_step_that_fails_kills_the_engine_loudly(model_dir: Path, run: Loop) -> None:
    engine = transformers_engine.build(TransformersConfig(timeout_s=30.0), str(model_dir))
    engine._model.lm_head = None
    with pytest.raises(EngineDied, match="died in a step"):
        generate(engine, run, [1, 2], Sampling(max_tokens=4))
    with pytest.raises(EngineDied):
        run(engine.score([1, 2]))
    run(engine.close())
    run(engine.close())


def test_closed_engines_say_so(model_dir: Path, run: Loop) -> None:
    engine = transformers_engine.build(TransformersConfig(), str(model_dir))
    run(engine.close())
    with pytest.raises(EngineDied, match="closed"):
        generate(engine, run, [1, 2], Sampling(max_tokens=4))


def test_a_missing_or_corrupt_model_is_one_line(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        vllm_engines.build(VllmConfig(), str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        transformers_engine.build(TransformersConfig(), str(tmp_path))
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        vllm_engines.build(VllmConfig(mode="process"), str(tmp_path))
    whole = (model_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        vllm_engines.build(VllmConfig(mode="http"), str(tmp_path))


def test_a_second_engine_in_this_process_is_refused(vllm_engine: Engine, model_dir: Path, run: Loop) -> None:
    with pytest.raises(UserError, match="one in_process engine lives here already"):
        vllm_engines.build(VllmConfig(), str(model_dir))
    run(vllm_engine.health())


def test_a_scheduler_that_does_not_exist_is_refused(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.scheduler_cls: cannot import nowhere\.Scheduler"):
        vllm_engines.build(VllmConfig(mode="process", scheduler_cls="nowhere.Scheduler"), str(model_dir))


def test_a_port_in_use_is_refused(model_dir: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use"):
            vllm_engines.build(VllmConfig(mode="http", extra={"port": port}), str(model_dir))


def test_no_server_at_the_url_is_refused(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.url"):
        vllm_engines.build(VllmConfig(mode="http", url="http://127.0.0.1:9"), str(model_dir))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["process", "http"])
def test_a_killed_owner_leaves_no_engine(mode: str, model_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time
            from pathlib import Path
            from rollout.config import VllmConfig
            from rollout.engines.vllm import build

            if __name__ == "__main__":
                config = VllmConfig(mode={mode!r}, kv_cache_gib=0.25)
                engine = build(config, {str(model_dir)!r}, log_path=Path({str(tmp_path / "engine.log")!r}))
                print("ready", flush=True)
                time.sleep(600)
            """
        )
    )
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert any("ready" in line for line in owner.stdout)
        children = psutil.Process(owner.pid).children(recursive=True)
        assert children
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_starting_an_engine_leaves_this_process_as_it_was(model_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import asyncio, os, random
            from pathlib import Path
            import torch
            from rollout.config import VllmConfig
            from rollout.engines.vllm import build

            torch.manual_seed(5)
            random.seed(5)
            threads = torch.get_num_threads()


            def environment():
                return {{key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}}


            before = environment(), random.getstate(), torch.get_rng_state()
            engine = build(VllmConfig(kv_cache_gib=0.1), {str(model_dir)!r}, log_path=Path("engine.log"))
            assert environment() == before[0], set(environment().items()) ^ set(before[0].items())
            assert random.getstate() == before[1]
            assert torch.equal(torch.get_rng_state(), before[2])
            assert torch.get_num_threads() == threads
            asyncio.run(engine.close())
            assert Path("engine.log").read_text()
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    noise = [line for line in (done.stdout + done.stderr).splitlines() if "accelerator" not in line]
    assert not noise  # the rest is in the log
