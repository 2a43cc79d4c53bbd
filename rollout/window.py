"""Windows of truncated rollouts: slots that always hold an episode, and so many tokens for each of them.

T-PPO (arXiv 2506.15050 §3.2, "successive batching") extends every episode by at most one window of l own tokens a
step. An episode that is over frees its slot at once: the newcomer gets what is left of the slot's window. A window is
over when every slot has written its tokens or waits for a tool; one that waits is carried in that state, and one that
has waited, and so lags behind, is cut once a slot that never waited has written all of its own: l engine steps have
gone by then. An episode is one coroutine for as long as it lives; at the end of a window it stands still wherever it
asks for more tokens, be that inside a tool call or a thought.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from rollout.episode import Episode, program_id
from rollout.errors import UserError

if TYPE_CHECKING:
    from rollout.runner import Job, Runner
    from rollout.speaker import Policy


class State(Enum):
    BUSY = "busy"  # starts, parses or is scored: moments
    ASKING = "asking"  # wants to write on
    WRITING = "writing"  # in the engine
    TOOL = "tool"  # waits for what it called


@dataclass(eq=False)
class Live:
    """An episode that is not over. ``age``: windows that it has met the end of."""

    job: Job
    episode: Episode
    age: int = 0
    state: State = State.BUSY
    gate: asyncio.Future[int] | None = None
    task: asyncio.Task[None] | None = None
    deadline: asyncio.Timeout | None = None


@dataclass(eq=False)
class Slot:
    """A place in the batch. ``left``: own tokens that whoever holds it may still write in this window."""

    left: int = 0
    live: Live | None = None
    lags: bool = False  # somebody in it waited for a tool in this window


@dataclass
class Ended:
    """What a window leaves: episodes that are over, by slot, copies of those that are not, and drops with causes.

    What ended since the window before, because a tool failed or filled the context in between, is among it.
    """

    finished: list[Episode]
    unfinished: list[Episode]
    drops: list[tuple[Job, str]]
    tokens: int  # written in it


class Window:
    """All windows of a run, one after the other. Lives on the rollout loop; ``play`` is for the trainer's thread.

    ``supply`` gives the next job when a slot is free; it is called on the rollout loop, while ``play`` waits. In
    lockstep newcomers start, and everyone writes on, only when all have stopped: batches then depend on the episodes
    alone, and nobody is cut. ``once``: unfinished episodes go to training too, and what they have written so far is
    from then on marked as trained. An episode that has met the end of ``max_age`` windows is dropped.
    """

    def __init__(self, runner: Runner, length: int, slots: int, max_age: int, *, once: bool) -> None:
        self.runner, self.length, self.max_age, self.once = runner, length, max_age, once
        self.policy: Policy | None = None  # set by the builder: the policy in turn asks its window for tokens
        self.supply: Callable[[], Job] | None = None  # set by whoever has jobs
        self.slots = [Slot() for _ in range(slots)]
        self._by_program: dict[str, Slot] = {}
        self._cut: set[str] = set()
        self._open = False
        self._ended: asyncio.Future[None] | None = None
        self._error: BaseException | None = None  # what ended the rollouts; perhaps between two windows
        # Of this window, and of the time since the one before:
        self._wrote = 0
        self._finished: list[tuple[int, Episode]] = []  # with the slots' numbers
        self._drops: list[tuple[Job, str]] = []

    # ---- the trainer's side

    def play(self, timeout: float) -> Ended:
        """Open a window, wait until it is over and give what it left; raises what ended the rollouts."""
        return self.runner.call(self._play(), timeout, f"a window of {self.length} tokens to end")

    def state_dict(self) -> dict[str, Any]:
        """Unfinished episodes by slot, as they stand between two windows, and what has ended since the last."""

        async def read() -> dict[str, Any]:
            slots = [
                None
                if slot.live is None
                else {"job": slot.live.job, "episode": slot.live.episode.snapshot(), "age": slot.live.age}
                for slot in self.slots
            ]
            return {"slots": slots, "finished": list(self._finished), "drops": list(self._drops)}

        return self.runner.call(read(), 60.0, "unfinished episodes to be written down")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the episodes up again; they go on when the next window opens."""
        if len(state["slots"]) != len(self.slots):
            raise UserError(
                f"batch.prompts, budget.samples: the run began with {len(state['slots'])} episodes at a time, now "
                f"there are {len(self.slots)}; give the numbers that it began with"
            )

        async def start() -> None:
            self._finished, self._drops = list(state["finished"]), list(state["drops"])
            for slot, kept in zip(self.slots, state["slots"], strict=True):
                if kept is not None:
                    self._start(slot, Live(kept["job"], kept["episode"], kept["age"]))

        self.runner.call(start(), 60.0, "unfinished episodes to be taken up")

    # ---- an episode's side, on the rollout loop

    async def grant(self, episode: Episode) -> int:
        """How many tokens the episode may write now; at the window's end this waits for the next one."""
        live = self._slot(episode).live
        assert live is not None and live.deadline is not None
        if self.runner.lockstep is not None:
            self.runner.lockstep.leave(program_id(episode))  # a retry after a failure in the engine
        loop = asyncio.get_running_loop()
        live.gate, live.state = loop.create_future(), State.ASKING
        when = live.deadline.when()
        assert when is not None
        spare = when - loop.time()
        live.deadline.reschedule(None)  # standing still is nobody's fault
        self._proceed()
        granted = await live.gate
        live.deadline.reschedule(loop.time() + spare)
        return granted

    def charge(self, episode: Episode, tokens: int) -> bool:
        """The episode wrote so many; True if the window cut it short."""
        slot, name = self._slot(episode), program_id(episode)
        assert slot.live is not None
        slot.left -= tokens
        slot.live.state = State.BUSY
        self._wrote += tokens
        if self.runner.lockstep is not None:
            self.runner.lockstep.leave(name)
        cut = name in self._cut
        if cut:
            self._cut.discard(name)
            slot.left = 0
        return cut

    # ---- the window itself

    async def _play(self) -> Ended:
        self._cut = set()
        for slot in self.slots:
            slot.left = self.length
            slot.lags = slot.live is not None and slot.live.state is State.TOOL
        self._ended = asyncio.get_running_loop().create_future()
        self._open = self._error is None
        if self._open:
            self._proceed()
            try:
                await self._ended
            finally:
                self._open = False
        if self._error is not None:
            raise self._error
        for live in self._lives():
            live.age += 1
            if live.age >= self.max_age:
                assert live.task is not None
                live.task.cancel()
                self._release(live)
                self._drops.append((live.job, "too_old"))
        finished = [episode for _, episode in sorted(self._finished, key=lambda pair: pair[0])]
        ended = Ended(finished, [live.episode.snapshot() for live in self._lives()], self._drops, self._wrote)
        self._finished, self._drops, self._wrote = [], [], 0
        if self.once:
            for sequence in (sequence for live in self._lives() for sequence in live.episode.sequences):
                sequence.trained = sequence.own_tokens
        return ended

    def _proceed(self) -> None:
        """Start and let on whoever may; see whether the window is over."""
        if not self._open:
            return
        lockstep = self.runner.lockstep
        exact = lockstep is not None
        if exact and self._any(State.BUSY, State.WRITING, State.TOOL):
            return
        started = False
        for slot in self.slots:
            if slot.live is None and slot.left > 0:
                assert self.supply is not None
                job = self.supply()
                self._start(slot, Live(job, Episode.begin(job.row, job.group_id, job.sample, job.reasoning)))
                started = True
        if exact and started:
            return
        going = [
            slot for slot in self.slots if slot.live is not None and slot.live.state is State.ASKING and slot.left > 0
        ]
        if lockstep is not None:
            for slot in going:
                assert slot.live is not None
                lockstep.enter(program_id(slot.live.job))
        for slot in going:
            assert slot.live is not None and slot.live.gate is not None
            slot.live.state = State.WRITING
            slot.live.gate.set_result(slot.left)
        if self._any(State.BUSY):
            return
        if self._any(State.WRITING):
            self._cut_laggards()
        elif self._wrote or not self._any(State.TOOL):  # with nothing written there is nothing to train on: wait
            self._end()

    def _cut_laggards(self) -> None:
        """After l engine steps the window is over also for those whose tools took some of them."""
        if self.runner.lockstep is not None or not any(slot.left <= 0 and not slot.lags for slot in self.slots):
            return
        writing = [slot for slot in self.slots if slot.live is not None and slot.live.state is State.WRITING]
        if not all(slot.lags for slot in writing):
            return
        assert self.policy is not None
        for slot in writing:
            assert slot.live is not None
            name = program_id(slot.live.job)
            if name not in self._cut:
                self._cut.add(name)
                task = asyncio.ensure_future(self.policy.engine.abort(name))
                task.add_done_callback(self._fail_with)

    def _start(self, slot: Slot, live: Live) -> None:
        assert self.policy is not None
        slot.live = live
        self._by_program[program_id(live.job)] = slot
        live.task = asyncio.ensure_future(self._run(live))
        live.task.add_done_callback(self._fail_with)

    async def _run(self, live: Live) -> None:
        """One slot's episode from here to its end."""
        from rollout.agent import EpisodeDropped

        def opened(episode: Episode, deadline: asyncio.Timeout) -> None:
            live.episode, live.deadline, live.state = episode, deadline, State.BUSY

        def waiting(begins: bool) -> None:
            live.state = State.TOOL if begins else State.BUSY
            if begins:
                self._slot(live.episode).lags = True
                self._proceed()

        assert self.policy is not None
        try:
            await self.runner.play_one(live.job, self.policy.speaker, live.episode, opened, waiting)
        except EpisodeDropped as error:
            self._drops.append((live.job, error.cause))
        else:
            self._finished.append((self.slots.index(self._slot(live.episode)), live.episode))
        self._release(live)
        self._proceed()

    def _release(self, live: Live) -> None:
        name = program_id(live.job)
        slot = self._by_program.pop(name)
        slot.live = None
        self._cut.discard(name)
        if self.runner.lockstep is not None:
            self.runner.lockstep.leave(name)

    def _fail_with(self, task: asyncio.Future[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()  # what came first is the cause
            self._end()

    def _end(self) -> None:
        self._open = False  # at once: who asks from here on waits for the next window
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _slot(self, episode: Episode) -> Slot:
        return self._by_program[program_id(episode)]

    def _lives(self) -> list[Live]:
        return [slot.live for slot in self.slots if slot.live is not None]

    def _any(self, *states: State) -> bool:
        return any(live.state in states for live in self._lives())
