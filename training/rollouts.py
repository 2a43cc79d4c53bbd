"""The ``window`` axis: how far episodes are played between two weight updates, and which of them go to training."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    """A member of the ``window`` group. ``ahead``: it plays while the trainer works."""

    source: Source
    ahead: bool

    def play(self, version: int) -> Round:
        """Play until there is something to train on; rewards are set."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
    away. ``ahead``: the next round is played while the trainer works on this one, one step off the policy.
    """

    def __init__(self, source: Source, *, spare: int = 0, ahead: bool = False) -> None:
        self.source, self.spare, self.ahead = source, spare, ahead
        self.buffer = RolloutBuffer()
        self._playing: list[tuple[Job, Future[Episode]]] = []
        self._version = 0  # of the policy when they were asked for

    def play(self, version: int) -> Round:
        source, past = self.source, Round([], [], 0, 0)
        for _ in range(source.axes.selection.max_rounds):
            missing = source.size - len(past.kept)
            if not self._playing:
                self._start([job for _, jobs in source.jobs(missing + self.spare) for job in jobs], version)
            past.slots += len(self._playing)
            groups = [source.rewarded(group) for group in self._take(version)]
            past.seen += groups
            past.kept += [group for group in groups if group.episodes and source.axes.selection.keep(group.episodes)]
            if len(past.kept) >= source.size:
                break
        past.drops, self.buffer.drops = self.buffer.drops, Counter()
        past.tokens = sum(episode.own_tokens for group in past.seen for episode in group.episodes)
        past.metrics = {"rollout/stale": float(self.buffer.stale)}
        if self.ahead:
            self._start([job for _, jobs in source.jobs(source.size) for job in jobs], version)
        return past

    def state_dict(self) -> dict[str, Any]:
        """What is in the air: played again from the start by whoever takes up from here."""
        return {"jobs": [job for job, _ in self._playing], "version": self._version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["jobs"]:
            self._start(state["jobs"], state["version"])

    def _start(self, jobs: list[Job], version: int) -> None:
        self._version = version
        for visit, size in Counter(job.group_id for job in jobs).items():
            self.buffer.expect(visit, size, version)
        # Engines that share the work should not get all of a large group each; siblings share their prompt's KV anyway.
        random.Random(f"{self.source.prompts.seed} {jobs[0].group_id}").shuffle(jobs)
        self._playing = self.source.runner.fill(self.buffer, jobs, self.source.policy.speaker)

    def _take(self, version: int) -> list[Group]:
        """The groups of this round: all that were started, less the spare ones that took longest."""
        started = len({job.group_id for job, _ in self._playing})
        source, stale = self.source, int(self.ahead)
        late = min(self.spare, max(started - 1, 0))
        groups = self.buffer.take(started - late, version=version, max_staleness=stale, timeout=source.timeout_s)
        for _, future in self._playing:
            future.cancel()  # the late ones; the others are done
        self.buffer.take(late, version=version, max_staleness=stale, timeout=source.timeout_s)
        self._playing = []
        return groups


class TruncatedRollouts:
    """T-PPO's successive batching: one window a round, slots that are always full (``rollout.window``).

    ``unfinished``: the advantage takes episodes that are not over, and each own token is trained in the window that
    wrote it; a reward then sees only those members of a group that ended together. Else a group is trained, whole,
    once its last member has finished: it is by then partly of older versions, and windows without such a group pass
    without a step, until as many groups have ended as the selection may see in one.
    """

    ahead = False

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
