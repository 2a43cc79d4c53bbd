"""Several engines as one: programs keep their member, weights reach all, and a death costs time and nothing else."""

from __future__ import annotations

import asyncio
import multiprocessing.resource_tracker
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.config import PROGRAM_SCHEDULER, LimitsConfig, VllmConfig
from rollout.engines import Sampling
from rollout.engines.router import Router, device_shares
from rollout.engines.vllm import build
from rollout.episode import program_id
from rollout.errors import EngineDied, UserError
from rollout.runner import Job, Runner
from rollout.scheduling.files import VARIABLES
from rollout.scheduling.options import KEY
from rollout.speaker import Policy
from rollout.tasks import ToolEnvironment
from rollout.tools.calculator import calculator
from rollout.weights import Probe, SyncMismatch, model_logprobs, named_weights, sync
from rollout.window import Window
from tests.conftest import Loop
from tests.rollout.taught import EASY, HARD, chat, taught

if TYPE_CHECKING:
    from rollout.engines.fleet import Fleet

IDS = [[(3 * i + 5 * j) % 500 for j in range(48)] for i in range(3)]
OPERATIONS = st.lists(st.tuples(st.sampled_from(["place", "release"]), st.integers(0, 5), st.integers(0, 3)))


@given(st.integers(1, 4), OPERATIONS)
def test_a_program_keeps_its_member_until_its_release(members: int, operations: list[tuple[str, int, int]]) -> None:
    router, kept = Router(members), dict[str, int]()
    for what, group, sample in operations:
        name = f"g{group}/{sample}"
        if what == "place":
            least = min(router.loads)
            member = router.place(name)
            assert kept.setdefault(name, member) == member
            assert router.loads[member] >= least
        else:
            router.release(name)
            kept.pop(name, None)
        assert router.loads == [list(kept.values()).count(m) for m in range(members)]


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), unique=True))
def test_new_programs_are_spread_evenly_and_siblings_meet_where_that_costs_nothing(
    members: int, programs: list[tuple[int, int]]
) -> None:
    router = Router(members)
    for group, sample in programs:
        before = list(router.loads)
        ties = [m for m in range(members) if before[m] == min(before)]
        siblings = [m for g, s in programs if g == group and (m := router.where(f"g{g}/{s}")) is not None]
        member = router.place(f"g{group}/{sample}")
        assert member in ties
        assert member in siblings or not set(ties) & set(siblings)
        assert max(router.loads) - min(router.loads) <= 1


@given(st.integers(2, 4), st.integers(0, 12), st.data())
def test_programs_of_a_member_that_is_down_go_elsewhere(members: int, programs: int, data: st.DataObject) -> None:
    router = Router(members)
    before = [router.place(f"g/{i}") for i in range(programs)]
    dead = data.draw(st.integers(0, members - 1))
    router.down(dead)
    after = [router.place(f"g/{i}") for i in range(programs)]
    assert dead not in after
    assert all(now == then for now, then in zip(after, before, strict=True) if then != dead)
    router.up(dead)
    assert [router.place(f"g/{i}") for i in range(programs)] == after
    assert router.loads[dead] == 0
    assert router.loads[router.place("new/0")] == 1, "one with the fewest, as it is"


def test_with_all_members_down_there_is_no_place() -> None:
    router = Router(1)
    router.down(0)
    assert router.place("a") is None
    router.up(0)
    assert router.place("a") == 0


@given(st.integers(1, 4), st.integers(1, 4), st.permutations(range(16)))
def test_every_replica_has_devices_of_its_own_in_order(replicas: int, each: int, wanted: list[int]) -> None:
    visible = [f"GPU-{i}" for i in range(16)]
    for asked in (None, wanted):
        shares = device_shares(replicas, each, asked, visible)
        assert [len(share) for share in shares] == [each] * replicas
        flat = [name for share in shares for name in share]
        assert flat == [visible[i] for i in (asked or range(16))][: replicas * each]


def test_too_few_or_unknown_devices_are_refused() -> None:
    with pytest.raises(UserError, match=r"2 x 4 devices .* are needed, there are 6; lower engine\.replicas"):
        device_shares(2, 4, None, list("012345"))
    with pytest.raises(UserError, match=r"2 x 1 devices .* there are 1"):
        device_shares(2, 1, [0], list("01"))
    with pytest.raises(UserError, match="there is no device 2; this process sees 2"):
        device_shares(1, 1, [2], list("01"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 2}, "engine.replicas: this process holds one engine, not 2; take engine=vllm_process"),
        ({"replicas": 2, "deterministic": True}, "take engine=vllm_process"),
        ({"replicas": 2, "mode": "http", "deterministic": True}, "engine.deterministic: needs"),
        ({"replicas": 2, "mode": "http", "url": "http://127.0.0.1:1"}, "engine.replicas: the server at engine.url"),
        ({"replicas": 2, "mode": "http", "extra": {"port": 1}}, "engine.extra.port: the replicas cannot share it"),
        ({"replicas": 0}, "engine.replicas: 0 must be at least 1"),
        ({"restarts": -1}, "engine.restarts: -1 must not be negative"),
        ({"devices": [0]}, "engine.devices: are for engines that are started as processes"),
        ({"devices": [1, 1], "mode": "process"}, "names a device twice"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VllmConfig(**settings)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def assert_gone(before: list[psutil.Process]) -> None:
    """No process is left that was not there before, but the one that multiprocessing keeps till the end."""
    started = [process for process in children() if process not in before]
    keeper = multiprocessing.resource_tracker._resource_tracker._pid
    _, alive = psutil.wait_procs([process for process in started if process.pid != keeper], timeout=15)
    assert not alive


@pytest.fixture(scope="module")
def fleet(model_dir: Path, tmp_path_factory: pytest.TempPathFactory, run: Loop) -> Iterator[Fleet]:
    """Two engines, for all tests of this file; those after a death find a replacement."""
    before = children()
    config = VllmConfig(mode="process", replicas=2, max_model_len=512, kv_cache_gib=0.1, timeout_s=120.0, restarts=6)
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copytree(model_dir, folder / "model")
    fleet = build(config, str(folder / "model"), log_path=folder / "engine.log")
    yield fleet
    run(fleet.close())
    assert_gone(before)


@pytest.mark.slow
def test_each_member_has_a_metrics_port_of_its_own(model_dir: Path, tmp_path: Path, run: Loop) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    scheduler = {KEY: {"policy": "turnstile", "metrics_port": port}}
    small = {"max_model_len": 512, "kv_cache_gib": 0.1, "timeout_s": 120.0}
    config = VllmConfig(
        mode="process", replicas=2, scheduler_cls=PROGRAM_SCHEDULER, scheduler_options=scheduler, **small
    )
    fleet = build(config, str(model_dir), log_path=tmp_path / "engine.log")
    try:
        for member in range(2):
            with urllib.request.urlopen(f"http://127.0.0.1:{port + member}/metrics") as answer:
                assert b"turnstile_turns_total" in answer.read()
    finally:
        run(fleet.close())


def moved(model: Any, seed: int) -> Any:
    """The model after a step that shows in its log-probs."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def member_counts(fleet: Fleet, run: Loop, name: str) -> list[float]:
    return [run(member.engine.stats())[name] for member in fleet._members]


def kill(fleet: Fleet, run: Loop, index: int, running: int = 0) -> None:
    """SIGKILL one member's processes, as soon as so many requests run there."""
    engine = fleet._members[index].engine
    while run(engine.stats())["running"] < running:
        time.sleep(0.01)
    for process in engine._llm.engine_core.resources.engine_manager.processes:
        psutil.Process(process.pid).kill()


def test_turns_of_a_program_find_their_cache_and_programs_are_shared_out(fleet: Fleet, run: Loop) -> None:
    before = member_counts(fleet, run, "requests")
    prompts = [[(7 * i + 13 * j) % 500 for j in range(100)] for i in range(6)]

    async def turns(i: int) -> int:
        first = await fleet.generate(prompts[i], Sampling(max_tokens=40), program_id=f"g{i}/0")
        assert set(first.versions) == {fleet.version}
        ids = [*prompts[i], *first.ids, 1, 2, 3]
        second = await fleet.generate(ids, Sampling(max_tokens=4), program_id=f"g{i}/0")
        await fleet.release(f"g{i}/0")
        return second.cached_tokens

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*map(turns, range(6)))

    assert min(run(all_of_them())) >= 128
    assert [after - b for after, b in zip(member_counts(fleet, run, "requests"), before, strict=True)] == [6, 6]
    assert run(fleet.stats())["requests"] == sum(before) + 12
    assert fleet.router.loads == [0, 0]


def test_weights_reach_every_member_and_the_gate_asks_every_one(fleet: Fleet, run: Loop, trainer_model: Any) -> None:
    model = moved(trainer_model, 1)
    seen: list[str] = []

    def stream() -> Iterator[tuple[str, Any]]:
        for name, tensor in named_weights(model):
            seen.append(name)
            yield name, tensor

    probe, version = Probe(IDS, 1e-4), fleet.version + 1
    logprobs = model_logprobs(model, IDS)
    assert run(sync(fleet, stream(), version, probe=probe, trainer_logprobs=lambda ids: logprobs)) < 1e-5
    assert len(seen) == len(set(seen)), "read once"
    assert [member.engine.version for member in fleet._members] == [version, version]
    # One member with other weights must not hide behind the other.
    for member in fleet._members:
        run(member.engine.update_weights(named_weights(moved(model, 2)), version))
        with pytest.raises(SyncMismatch):
            run(probe.check(fleet, logprobs))
        run(member.engine.load(iter(fleet._weights.paths), version))
        assert run(probe.check(fleet, logprobs)) < 1e-5


def test_a_member_killed_in_a_batch_loses_no_episode_and_comes_back_on_the_last_weights(
    fleet: Fleet, run: Loop, trainer_model: Any
) -> None:
    model, probe, version = moved(trainer_model, 3), Probe(IDS, 1e-4), fleet.version + 1
    logprobs = model_logprobs(model, IDS)
    run(sync(fleet, named_weights(model), version, probe=probe, trainer_logprobs=lambda ids: logprobs))
    shutil.rmtree(fleet._model_dir)  # as keep_last deletes the checkpoint that a run was resumed from
    deaths = run(fleet.stats())["restarts"]
    policy = Policy(fleet, chat(), Sampling(max_tokens=1), 512)
    limits = LimitsConfig(max_new_tokens=400, episode_timeout_s=120.0, retries=0)
    jobs = [Job(row, f"{row.id}.{i}", sample) for i in range(4) for row in (EASY, HARD) for sample in range(4)]
    with closing(Runner(lambda: ToolEnvironment([], lambda answer, gold: False), limits, concurrency=16)) as runner:
        killer = threading.Thread(target=kill, args=(fleet, run, 1, 6))
        killer.start()
        episodes = runner.play(jobs, policy.speaker, lambda done: None)
        killer.join(10.0)
        assert not runner.lost
    assert Counter((e.group_id, e.sample) for e in episodes) == Counter((job.group_id, job.sample) for job in jobs)
    for episode in episodes:
        (sequence,) = episode.sequences
        own = [i for i, mine in enumerate(sequence.own_mask) if mine]
        assert {sequence.versions[i] for i in own} == {version}
        (expected,) = model_logprobs(model, [sequence.token_ids])
        assert max(abs(sequence.behaviour_logprobs[i] - expected[i - 1]) for i in own) < 1e-4, "no half answer"
    assert run(fleet.stats())["restarts"] == deaths + 1
    assert run(probe.check(fleet, logprobs)) < 1e-5  # both, the replacement among them
    assert [member.engine.version for member in fleet._members] == [version, version]
    assert fleet.router.loads == [0, 0]


def test_a_replacement_starts_from_the_tool_latencies_that_were_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rollout.engines.member import replacement_variables

    saved, known = tmp_path / "saved.json", tmp_path / "known.json"
    monkeypatch.setenv(VARIABLES["save_latencies"], str(saved))
    monkeypatch.setenv(VARIABLES["latencies"], str(known))
    latencies = VARIABLES["latencies"]
    assert replacement_variables({"A": "1"}) == {"A": "1", latencies: ""}, "the run's checkpoint was deleted"
    known.touch()
    assert replacement_variables({})[latencies] == str(known)
    saved.touch()
    assert replacement_variables({})[latencies] == str(saved)


@pytest.mark.slow
def test_an_episode_that_a_window_cut_goes_on_from_its_tokens_on_another_member(
    fleet: Fleet, run: Loop, model_dir: Path
) -> None:
    """Greedy, so that what it writes on two members is what one would have written."""
    run(fleet.update_weights(named_weights(taught(model_dir)), fleet.version + 1))
    greedy = Policy(fleet, chat(), Sampling(max_tokens=1, temperature=0.0), 512)
    limits = LimitsConfig(max_new_tokens=64, episode_timeout_s=120.0, retries=0)
    jobs = (Job(HARD, f"hard.{i}", 0) for i in count())
    with closing(Runner(lambda: ToolEnvironment([calculator], lambda a, gold: a == gold), limits)) as runner:
        window = Window(runner, 8, 2, max_age=100, once=True)
        window.policy, window.supply = replace(greedy, window=window), lambda: next(jobs)
        first = window.play(120.0)
        assert [episode.open_tokens for episode in first.unfinished] == [8, 8]
        places = {program_id(e): fleet.router.where(program_id(e)) for e in first.unfinished}
        assert sorted(places.values()) == [0, 1]
        moving = next(program for program, member in places.items() if member == 0)
        kill(fleet, run, 0)
        finished = []
        while len(finished) < 4:
            ended = window.play(120.0)
            assert not ended.drops
            finished += ended.finished
            if moving in {program_id(episode) for episode in ended.unfinished}:
                assert fleet.router.where(moving) == 1
    assert {program_id(episode) for episode in finished} >= set(places)
    assert all(episode.success for episode in finished)


@pytest.mark.slow
def test_an_abort_holds_whether_or_not_the_member_lives_to_see_it(fleet: Fleet, run: Loop) -> None:
    async def aborted(die: bool) -> str:
        call = fleet.generate([1, 2], Sampling(max_tokens=500), program_id="a/0")
        task = asyncio.create_task(call)
        await asyncio.sleep(0.2)
        if die:
            await asyncio.to_thread(kill, fleet, run, fleet.router.where("a/0"))
        await fleet.abort("a/0")
        out = await task
        await fleet.release("a/0")
        return out.finish

    assert asyncio.run(aborted(die=False)) == "abort"
    assert asyncio.run(aborted(die=True)) == "abort"


@pytest.mark.slow
def test_no_call_waits_for_an_engine_that_is_closed(fleet: Fleet, run: Loop) -> None:
    """Generations and control calls alike: one that is lost would wait for its time-out."""
    run(fleet.health())
    engine = fleet._members[0].engine

    async def scenario() -> list[Any]:
        generation = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=500), program_id="c/0"))
        await asyncio.sleep(0.2)
        calls = [generation, *(asyncio.create_task(engine.pause("wait")) for _ in range(3))]
        await asyncio.sleep(0.05)
        await engine.close()
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10.0)

    assert {type(result) for result in run(scenario())} == {EngineDied}
    run(fleet.health())  # replaced


@pytest.mark.slow
def test_what_is_paused_stays_so_through_a_death(fleet: Fleet, run: Loop) -> None:
    run(fleet.pause("keep"))
    kill(fleet, run, 0)
    time.sleep(2.0)

    async def scenario() -> tuple[bool, int]:
        calls = (fleet.generate([1, 2], Sampling(max_tokens=4), program_id=f"p{i}/0") for i in range(2))
        task = asyncio.gather(*calls)
        await fleet.health()
        done, _ = await asyncio.wait([task], timeout=1.0)
        await fleet.resume()
        return bool(done), sum(len(out.ids) for out in await task)

    assert run(scenario()) == (False, 8)
    for i in range(2):
        run(fleet.release(f"p{i}/0"))
    run(fleet.sleep(1))
    run(fleet.wake(None))


@pytest.mark.slow
def test_zz_too_many_deaths_end_the_fleet_with_one_line(fleet: Fleet, run: Loop) -> None:
    """Last of all: one more death than allowed, seen by a call that is under way."""
    run(fleet.health())
    fleet._members[1].deaths = fleet.config.restarts
    task = asyncio.run_coroutine_threadsafe(
        fleet.generate([1, 2], Sampling(max_tokens=500), program_id="z/0"), run.loop
    )
    kill(fleet, run, 1)
    with pytest.raises(EngineDied, match=r"engine 1 of 2 died 7 times, engine\.restarts=6: .*engine-1\.log"):
        for _ in range(100):  # vLLM takes a moment to see it
            run(fleet.health())
            time.sleep(0.1)
    with pytest.raises(EngineDied, match="died 7 times"):
        run(fleet.generate([1, 2], Sampling(max_tokens=5), program_id="y/0"))
    task.result(60.0)  # another member's: it ends in peace


@pytest.mark.slow
def test_a_server_that_dies_is_started_anew_for_a_fleet_of_one(
    model_dir: Path, tmp_path: Path, run: Loop, trainer_model: Any
) -> None:
    """What ``replicas=1`` is in a run; here over HTTP, killed in a weight update as well."""
    before = children()
    config = VllmConfig(mode="http", max_model_len=512, kv_cache_gib=0.1, timeout_s=200.0)
    fleet = build(config, str(model_dir), log_path=tmp_path / "engine.log")
    model, probe = moved(trainer_model, 4), Probe(IDS, 1e-4)
    logprobs = model_logprobs(model, IDS)

    async def killed_while(call: Coroutine[Any, Any, Any], seconds: float) -> Any:
        task = asyncio.create_task(call)
        await asyncio.sleep(seconds)
        os.killpg(fleet._members[0].engine._server.pid, signal.SIGKILL)
        return await task

    def stream() -> Iterator[tuple[str, Any]]:
        time.sleep(1.0)
        yield from named_weights(model)

    try:
        run(killed_while(fleet.update_weights(stream(), 1), 0.3), 300.0)
        assert run(probe.check(fleet, logprobs)) < 1e-5
        out = run(killed_while(fleet.generate([1, 2], Sampling(max_tokens=400), program_id="a/0"), 0.2), 300.0)
        assert (len(out.ids), set(out.versions)) == (400, {1})
        assert run(fleet.stats())["restarts"] == 2
        assert run(probe.check(fleet, logprobs)) < 1e-5
    finally:
        run(fleet.close())
    assert_gone(before)
