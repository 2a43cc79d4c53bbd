"""A program stays with its replica, programs spread evenly, and only those of a failed replica move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.affinity import FORGET_S, LIVE_S, Homes

REPLICAS = st.integers(2, 8)


def turn(homes: Homes, program: str | None, up: list[int], now: float) -> int:
    visit = homes.begin(program, up, now)
    homes.end(visit, now)
    return visit.replica


@given(REPLICAS, st.lists(st.tuples(st.integers(0, 30), st.floats(0, FORGET_S / 200)), max_size=200))
def test_a_program_stays_while_its_replica_is_up(replicas: int, turns: list[tuple[int, float]]) -> None:
    homes, places, now = Homes(replicas), {}, 0.0
    for program, pause in turns:
        now += pause
        place = turn(homes, str(program), list(range(replicas)), now)
        assert places.setdefault(program, place) == place


@given(REPLICAS, st.integers(1, 100), st.booleans())
def test_programs_that_come_together_spread_evenly(replicas: int, programs: int, waiting: bool) -> None:
    """Whether they generate when the next one comes, or wait for their tools."""
    homes = Homes(replicas)
    visits = []
    for program in range(programs):
        visits.append(homes.begin(str(program), range(replicas), 0.0))
        if waiting:
            homes.end(visits[-1], 0.0)
    counts = [sum(visit.replica == replica for visit in visits) for replica in range(replicas)]
    assert max(counts) - min(counts) <= 1


@given(REPLICAS, st.integers(1, 60), st.data())
def test_only_the_programs_of_a_failed_replica_move_and_they_stay_moved(
    replicas: int, programs: int, data: st.DataObject
) -> None:
    homes, everyone = Homes(replicas), list(range(replicas))
    before = [turn(homes, str(program), everyone, 0.0) for program in range(programs)]
    dead = data.draw(st.sampled_from(everyone))
    during = [turn(homes, str(program), [r for r in everyone if r != dead], 1.0) for program in range(programs)]
    after = [turn(homes, str(program), everyone, 2.0) for program in range(programs)]
    assert dead not in during
    assert all(was == now for was, now in zip(before, during, strict=True) if was != dead)
    assert after == during


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=50), st.data())
def test_loads_come_back_to_nothing(programs: list[str | None], data: st.DataObject) -> None:
    """In whatever order requests end, and whatever fails, moves, is released or forgotten meanwhile."""
    homes, open_visits, now = Homes(2), [], 0.0
    for program in programs:
        now += data.draw(st.sampled_from([0.0, 1.0, FORGET_S]))
        up = data.draw(st.sampled_from([[0], [1], [0, 1]]))
        open_visits.append(homes.begin(program, up, now))
        if program is not None and data.draw(st.booleans()):
            homes.release(program)
        if data.draw(st.booleans()):
            homes.end(open_visits.pop(data.draw(st.integers(0, len(open_visits) - 1))), now)
    for visit in open_visits:
        homes.end(visit, now)
    later = now + LIVE_S
    visits = [homes.begin(None, [0, 1], later) for _ in range(2)]
    assert [visit.replica for visit in visits] == [0, 1]


def test_a_request_without_a_name_goes_to_the_least_loaded() -> None:
    homes = Homes(2)
    busy = homes.begin("long", [0, 1], 0.0)
    assert [turn(homes, None, [0, 1], 0.0) for _ in range(3)] == [1 - busy.replica] * 3


def test_programs_that_went_away_are_no_load() -> None:
    """A replica that comes back empty does not get all newcomers for as long as the others remember old programs."""
    homes = Homes(2)
    for program in range(10):
        turn(homes, f"old{program}", [1], 0.0)
    places = [turn(homes, f"new{program}", [0, 1], LIVE_S) for program in range(10)]
    assert places == [0, 1] * 5


def test_released_and_forgotten_programs_start_anew() -> None:
    homes = Homes(2)
    for program, now in (("released", 0.0), ("forgotten", 0.0)):
        assert turn(homes, program, [0], now) == 0
    homes.release("released")
    busy = [homes.begin(None, [0], FORGET_S) for _ in range(2)]
    assert {turn(homes, program, [0, 1], FORGET_S) for program in ("released", "forgotten")} == {1}
    for visit in busy:
        homes.end(visit, FORGET_S)


def test_no_replica_is_an_error() -> None:
    with pytest.raises(ValueError, match="no replica is up"):
        Homes(2).begin("a", [], 0.0)
