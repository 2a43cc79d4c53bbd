"""The waiting queue: any order that a policy gives, and requests that it does not admit."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import Request

from rollout.scheduling.latency import ToolLatencies
from rollout.scheduling.policy import Key, Policy
from rollout.scheduling.program_queue import ProgramQueue
from rollout.scheduling.programs import Programs, Turn
from tests.rollout.scheduling.driver import request


class ByLabel(Policy):
    """Order and admission as the test says."""

    def __init__(self) -> None:
        self.keys: dict[str, float] = {}
        self.shut: set[str] = set()

    def key(self, turn: Turn) -> Key:
        return (self.keys.get(turn.request_id, 0.0),)

    def may_start(self, turn: Turn) -> bool:
        return turn.request_id not in self.shut


class Waiting:
    def __init__(self, by_priority: bool = False) -> None:
        self.rule, self.programs = ByLabel(), Programs(ToolLatencies())
        self.queue = ProgramQueue(self.rule, self.programs.turns, by_priority)
        self.made: dict[str, Request] = {}

    def add(self, name: str, key: float = 0.0, priority: int = 0) -> Request:
        self.made[name] = request(name, [1], 1, priority=priority)
        self.programs.arrive(name, None, 1, 0.0)
        self.programs.turns[name].priority = priority
        self.rule.keys[name] = key
        self.queue.add_request(self.made[name])
        return self.made[name]

    @property
    def names(self) -> list[str]:
        return [made.request_id for made in self.queue]

    def pop(self) -> str:
        assert self.queue
        first = self.queue.peek_request()
        assert self.queue.pop_request() is first
        return first.request_id


def test_smallest_key_first_and_ties_by_arrival() -> None:
    waiting = Waiting()
    for name, key in (("b", 2), ("a", 1), ("c", 2), ("d", 1)):
        waiting.add(name, key)
    assert waiting.names == ["a", "d", "b", "c"] and len(waiting.queue) == 4
    assert [waiting.pop() for _ in range(4)] == ["a", "d", "b", "c"]
    assert not waiting.queue and len(waiting.queue) == 0


def test_client_priority_comes_before_the_policy_where_vllm_honours_it() -> None:
    for by_priority, expected in ((True, ["c", "b", "a"]), (False, ["a", "b", "c"])):
        waiting = Waiting(by_priority)
        for key, (name, priority) in enumerate((("a", 2), ("b", 1), ("c", -5))):
            waiting.add(name, key, priority)
        assert waiting.names == expected


def test_keys_that_changed_count_after_a_sort() -> None:
    waiting = Waiting()
    for name in "abc":
        waiting.add(name, ord(name))
    waiting.rule.keys["c"] = 0
    assert waiting.names == ["a", "b", "c"]
    waiting.queue.sort()
    assert waiting.names == ["c", "a", "b"]


def test_a_preempted_request_goes_to_where_its_program_stands() -> None:
    waiting = Waiting()
    for name in "abc":
        waiting.add(name, ord(name))
    first, second = waiting.queue.pop_request(), waiting.queue.pop_request()
    waiting.rule.keys["a"] = ord("z")
    waiting.queue.prepend_request(first)
    assert waiting.names == ["c", "a"]
    waiting.queue.prepend_requests([second])
    assert waiting.names == ["b", "c", "a"]


@pytest.mark.parametrize("by_priority", [False, True])
def test_who_may_not_start_is_counted_and_under_priorities_passed_over(by_priority: bool) -> None:
    waiting = Waiting(by_priority)
    for name in "abc":
        waiting.add(name, ord(name))
    waiting.rule.shut = {"a"}
    if by_priority:
        assert waiting.queue and waiting.queue.peek_request().request_id == "b" and waiting.pop() == "b"
    else:
        assert not waiting.queue, "the policy's own order has those it admits at the front"
    waiting.rule.shut = {"a", "b", "c"}
    assert not waiting.queue and len(waiting.queue) == len(waiting.names) == (2 if by_priority else 3)
    waiting.rule.shut = set()
    assert waiting.pop() == "a"


def test_removal() -> None:
    waiting = Waiting()
    for name in "abcd":
        waiting.add(name, ord(name))
    stranger = request("never here", [1], 1)
    waiting.queue.remove_request(waiting.made["b"])
    waiting.queue.remove_requests({waiting.made["d"], stranger})
    assert waiting.names == ["a", "c"]
    del waiting.programs.turns["a"]  # vLLM frees a request before it takes it off the queue
    waiting.queue.remove_requests([waiting.made["a"]])
    assert waiting.names == ["c"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aaaprs"), st.integers(0, 5), st.integers(0, 2)), max_size=60), st.booleans())
def test_it_is_a_sorted_list(events: list[tuple[str, int, int]], by_priority: bool) -> None:
    waiting, model = Waiting(by_priority), []
    draw = random.Random(0)

    def place(name: str) -> tuple[Any, ...]:
        turn = waiting.programs.turns[name]
        return (turn.priority if by_priority else 0, waiting.rule.keys[name], turn.order)

    for number, (event, key, priority) in enumerate(events):
        if event == "a":
            waiting.add(f"r{number}", key, priority)
            model.append(f"r{number}")
        elif event == "p" and model:
            model.sort(key=place)
            assert waiting.pop() == model.pop(0)
        elif event == "r" and model:
            gone = model.pop(draw.randrange(len(model)))
            waiting.queue.remove_request(waiting.made[gone])
        elif event == "s" and model:
            waiting.rule.keys[draw.choice(model)] = key
            waiting.queue.sort()
        assert waiting.names == sorted(model, key=place) and bool(waiting.queue) == bool(model)


@pytest.mark.parametrize("method", ["peek_request", "pop_request"])
def test_an_empty_queue_has_no_first(method: str) -> None:
    with pytest.raises(IndexError):
        getattr(Waiting().queue, method)()
