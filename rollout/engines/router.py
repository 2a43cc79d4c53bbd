"""Which engine of several plays which program, and on which devices each runs: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rollout.errors import UserError


class Router:
    """Programs stick to the member that holds their cache; a new one goes to the member with the fewest.

    Among members with equally few, one that plays siblings of its group (``group/sample``, ``episode.program_id``)
    comes first, since it has their prompt's cache; then the one with the lowest number.
    """

    def __init__(self, members: int) -> None:
        self.loads = [0] * members  # programs in flight
        self._up = set(range(members))
        self._placed: dict[str, int] = {}
        self._siblings: Counter[tuple[str, int]] = Counter()

    def place(self, program: str) -> int | None:
        """The program's member, the same until its release unless that goes down; None while none is up."""
        if program in self._placed:
            return self._placed[program]
        if not self._up:
            return None
        group = _group(program)
        member = min(self._up, key=lambda m: (self.loads[m], self._siblings[group, m] == 0, m))
        self._placed[program] = member
        self.loads[member] += 1
        self._siblings[group, member] += 1
        return member

    def where(self, program: str) -> int | None:
        """The program's member, if it has one."""
        return self._placed.get(program)

    def release(self, program: str) -> None:
        """The program is over; one that has no place is passed over."""
        member = self._placed.pop(program, None)
        if member is None:
            return
        self.loads[member] -= 1
        key = (_group(program), member)
        self._siblings[key] -= 1
        if not self._siblings[key]:
            del self._siblings[key]

    def down(self, member: int) -> None:
        """The member's cache is gone: its programs go elsewhere at their next turn, and no other comes to it."""
        self._up.discard(member)
        for program in [program for program, place in self._placed.items() if place == member]:
            self.release(program)

    def up(self, member: int) -> None:
        """The member takes programs again."""
        self._up.add(member)


def _group(program: str) -> str:
    return program.rpartition("/")[0]


def device_shares(
    replicas: int, each: int, wanted: Sequence[int] | None, visible: Sequence[str]
) -> list[tuple[str, ...]]:
    """``each`` devices for every replica, none shared, in order.

    Args:
        wanted: positions among ``visible``, as torch numbers devices; None takes them from the first on.
        visible: what CUDA_VISIBLE_DEVICES calls each device that this process sees.
    """
    positions = list(range(len(visible)) if wanted is None else wanted)
    unknown = [position for position in positions if not 0 <= position < len(visible)]
    if unknown:
        raise UserError(f"engine.devices: there is no device {unknown[0]}; this process sees {len(visible)}")
    need = replicas * each
    if len(positions) < need:
        raise UserError(
            f"engine.devices: {replicas} x {each} devices (engine.replicas x engine.tensor_parallel_size) are needed, "
            f"there are {len(positions)}; lower engine.replicas"
        )
    names = [visible[position] for position in positions[:need]]
    return [tuple(names[start : start + each]) for start in range(0, need, each)]
