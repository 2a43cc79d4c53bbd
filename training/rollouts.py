"""The ``window`` axis: how far episodes are played between two weight updates, and which of them go to training."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from rollout.buffer import Group, RolloutBuffer
from rollout.episode import Episode
from rollout.errors import UserError
from rollout.reasoning import forced_modes, maybe_told
from rollout.runner import Job, Runner
from rollout.speaker import Policy
from rollout.window import Window
from training.budgets import Budget
from training.estimates import Advantage
from training.prompts import PromptOrder
from training.rewards import Reward
from training.selection import Selection
from training.settings import ReasoningConfig


@dataclass
class Round:
    """What came of one stretch of rollouts. ``seen``: groups whose episodes ended; ``kept``: those to train on."""

    seen: list[Group]
    kept: list[Group]
    tokens: int  # written in it
    slots: int  # episodes at a time
    drops: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)


class Rollouts(Protocol):
    """A member of the ``window`` group. ``ahead``: rounds that it plays while the trainer works."""

    source: Source
    ahead: int

    def play(self, version: int) -> Round:
        """Play until there is something to train on; rewards are set."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Flight(NamedTuple):
    """One round's jobs in the air."""

    jobs: list[Job]
    futures: list[Future[Episode]]


@dataclass
class Axes:
    """The members that make a run's algorithm; the loop asks them and never which they are."""

    budget: Budget
    reward: Reward
    advantage: Advantage
    selection: Selection


@dataclass
class Source:
    """Where jobs come from, who plays them, and what their episodes are worth. ``size``: prompts a round."""

    prompts: PromptOrder
    axes: Axes
    runner: Runner
    policy: Policy
    size: int
    timeout_s: float
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)

    def jobs(self, prompts: int) -> list[tuple[str, list[Job]]]:
        """By visit, the jobs that the budget gives to the next prompts; one that gets none is passed over."""
        shares = self.reasoning
        asked = [
            (maybe_told(row, visit, shares.told_always, shares.told_never), visit)
            for row, visit in self.prompts.take(prompts)
        ]
        counts = self.axes.budget([row for row, _ in asked])
        jobs = []
        for (row, visit), count in zip(asked, counts, strict=True):
            forced = (0.0, 0.0) if row.extras.get("told") else (shares.forced_always, shares.forced_never)
            modes = forced_modes(count, *forced)
            if count:
                jobs.append((visit, [Job(row, visit, sample, mode) for sample, mode in enumerate(modes)]))
        return jobs

    def rewarded(self, group: Group) -> Group:
        """The group with its rewards; the budget sees it too."""
        self.axes.budget.observe(group.episodes)
        with self.runner.activity.during("reward"):
            judged = self.axes.reward(group.episodes)
        for episode, rewards in zip(group.episodes, judged, strict=True):
            episode.rewards = rewards
            if not math.isfinite(episode.reward):
                raise UserError(f"reward: {rewards} of prompt {episode.prompt_id} is not finite; mend it")
        return group


class CompleteRollouts:
    """Every episode to its end: whole groups, and the engine waits for the longest.

    ``spare``: so many more prompts are started than a round needs; the first groups to end are kept, the others thrown
    away. ``ahead``: so many later rounds are played while the trainer works on this one. Each is trained in its turn,
    as many weight updates after it was started as there are rounds ahead, whatever its episodes' lengths.
    """

    def __init__(self, source: Source, *, spare: int = 0, ahead: int = 0) -> None:
        self.source, self.spare, self.ahead = source, spare, ahead
        self.buffer = RolloutBuffer()
        self._flights: deque[Flight] = deque()  # the oldest first
        self._started = 0  # rounds: what the buffer counts as versions

    def play(self, version: int) -> Round:
        source, past = self.source, Round([], [], 0, 0)
        self._fly_ahead()
        for _ in range(source.axes.selection.max_rounds):
            missing = source.size - len(past.kept)
            if not self._flights:
                self._start(missing)
            past.slots += len(self._flights[0].jobs)
            groups = [source.rewarded(group) for group in self._take()]
            past.seen += groups
            past.kept += [group for group in groups if group.episodes and source.axes.selection.keep(group.episodes)]
            if len(past.kept) >= source.size:
                break
        past.drops, self.buffer.drops = self.buffer.drops, Counter()
        past.tokens = sum(episode.own_tokens for group in past.seen for episode in group.episodes)
        self._fly_ahead()
        return past

    def state_dict(self) -> dict[str, Any]:
        """What is in the air: played again from the start by whoever takes up from here."""
        return {"flights": [flight.jobs for flight in self._flights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for jobs in state["flights"]:
            self._play(jobs)

    def _fly_ahead(self) -> None:
        while len(self._flights) < self.ahead:
            self._start(self.source.size)

    def _start(self, prompts: int) -> None:
        self._play([job for _, jobs in self.source.jobs(prompts + self.spare) for job in jobs])

    def _play(self, jobs: list[Job]) -> None:
        self._started += 1
        for visit, size in Counter(job.group_id for job in jobs).items():
            self.buffer.expect(visit, size, self._started)
        # Engines that share the work should not get all of a large group each; siblings share their prompt's KV anyway.
        mixed = random.Random(f"{self.source.prompts.seed} {jobs[0].group_id}").sample(jobs, len(jobs))
        started = self.source.runner.fill(self.buffer, mixed, self.source.policy.speaker)
        self._flights.append(Flight(jobs, [future for _, future in started]))

    def _take(self) -> list[Group]:
        """The groups of the oldest flight: all that were started, less the spare ones that took longest."""
        flight = self._flights.popleft()
        started = len({job.group_id for job in flight.jobs})
        late = min(self.spare, max(started - 1, 0))
        groups = self.buffer.take(started - late, timeout=self.source.timeout_s)
        for future in flight.futures:
            future.cancel()  # the late ones; the others are done
        self.buffer.take(late, timeout=self.source.timeout_s)
        return groups


class TruncatedRollouts:
    """T-PPO's successive batching: one window a round, slots that are always full (``rollout.window``).

    ``unfinished``: the advantage takes episodes that are not over, and each own token is trained in the window that
    wrote it; a reward then sees only those members of a group that ended together. Else a group is trained, whole,
    once its last member has finished: it is by then partly of older versions, and windows without such a group pass
    without a step, until as many groups have ended as the selection may see in one.
    """

    ahead = 0

    def __init__(self, source: Source, window: Window, *, unfinished: bool) -> None:
        self.source, self.window, self.unfinished = source, window, unfinished
        self.buffer = RolloutBuffer()
        self._jobs: deque[Job] = deque()  # of groups that have been asked for
        self._version = 0
        window.supply = self._next

    def play(self, version: int) -> Round:
        self._version = version
        past = Round([], [], 0, len(self.window.slots))
        most = self.source.axes.selection.max_rounds * self.source.size
        while not past.kept and len(past.seen) < most:
            ended = self.window.play(self.source.timeout_s)
            past.tokens += ended.tokens
            past.drops.update(cause for _, cause in ended.drops)
            past.metrics = {"rollout/unfinished": float(len(ended.unfinished))}
            if self.unfinished:
                finished = [self.source.rewarded(group) for group in _by_group(ended.finished, version)]
                fresh = [episode for episode in ended.unfinished if _fresh(episode)]
                past.seen += finished
                past.kept = _by_group([*ended.finished, *fresh], version)
            else:
                for job, cause in ended.drops:
                    self.buffer.drop(job.group_id, cause)
                for episode in ended.finished:
                    self.buffer.add(episode)
                groups = [self.source.rewarded(group) for group in self.buffer.ready()]
                past.seen += groups
                past.kept = [g for g in groups if g.episodes and self.source.axes.selection.keep(g.episodes)]
        return past

    def state_dict(self) -> dict[str, Any]:
        """Unfinished episodes, jobs that wait for a slot, and groups whose last member is not over."""
        return {"live": self.window.state_dict(), "jobs": list(self._jobs), "groups": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._jobs = deque(state["jobs"])
        self.buffer.load_state_dict(state["groups"])
        self.window.load_state_dict(state["live"])

    def _next(self) -> Job:
        """The next job; on the rollout loop, while ``play`` waits."""
        while not self._jobs:
            for visit, jobs in self.source.jobs(self.source.size):
                if not self.unfinished:
                    self.buffer.expect(visit, len(jobs), self._version)
                self._jobs.extend(jobs)
        return self._jobs.popleft()


def _by_group(episodes: list[Episode], version: int) -> list[Group]:
    """Those that belong together, in order of first sight."""
    groups: dict[str, Group] = {}
    for episode in episodes:
        group = groups.setdefault(episode.group_id, Group(episode.group_id, 0, version, len(groups)))
        group.episodes.append(episode)
        group.size += 1
    return list(groups.values())


def _fresh(episode: Episode) -> bool:
    return any(sequence.own_tokens > sequence.trained for sequence in episode.sequences)
