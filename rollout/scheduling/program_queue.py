"""vLLM's waiting queue in the order that a policy gives."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from rollout.scheduling.policy import Key, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollout.scheduling.programs import Turn


class ProgramQueue(RequestQueue):
    """Requests by (client priority where vLLM honours it, the policy's key, arrival).

    Keys change while requests wait (a pin goes, a turn becomes express): ``sort`` is called once a step then. With
    client priorities a request that the policy does not admit is passed over: it may stand before a program whose turn
    everyone waits for. If none is admitted the queue looks empty to the scheduling loop; its length is counted.
    """

    def __init__(self, policy: Policy, turns: Mapping[str, Turn], by_priority: bool) -> None:
        self._policy, self._turns, self._by_priority = policy, turns, by_priority
        self._items: list[tuple[Key, int, Request]] = []

    def sort(self) -> None:
        self._items = sorted(self._item(request) for *_, request in self._items)

    def add_request(self, request: Request) -> None:
        bisect.insort(self._items, self._item(request))

    def pop_request(self) -> Request:
        return self._items.pop(self._head() or 0)[2]

    def peek_request(self) -> Request:
        return self._items[self._head() or 0][2]

    def prepend_request(self, request: Request) -> None:
        """A preempted request goes to where its program stands, not to the front."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        gone = {request.request_id for request in requests}
        self._items = [item for item in self._items if item[2].request_id not in gone]

    def __bool__(self) -> bool:
        return self._head() is not None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Request]:
        return (request for *_, request in self._items)

    def _head(self) -> int | None:
        """Place of the first request that may be admitted. Without client priorities the policy's order tells."""
        may_start, turns = self._policy.may_start, self._turns
        items = self._items if self._by_priority else self._items[:1]
        return next((i for i, item in enumerate(items) if may_start(turns[item[2].request_id])), None)

    def _item(self, request: Request) -> tuple[Key, int, Request]:
        turn = self._turns[request.request_id]
        priority = (turn.priority,) if self._by_priority else ()
        return (*priority, *self._policy.key(turn)), turn.order, request
