"""Rollouts in their own asyncio thread: they play jobs and fill the buffer, or collect a list for evaluation."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rollout.activity import Activity
from rollout.agent import EpisodeDropped, Speaker, run_episode
from rollout.buffer import RolloutBuffer
from rollout.config import LimitsConfig
from rollout.environment import Environment, Row
from rollout.episode import Episode, program_id
from rollout.errors import EngineDied, UserError, WaitTimeout

if TYPE_CHECKING:
    from rollout.engines.lockstep import Lockstep


@dataclass(frozen=True)
class Job:
    """One episode to play. ``group_id`` names the visit to the prompt, ``sample`` the member of the group.

    ``reasoning`` is a mode for the template to force; None leaves it to the policy's settings.
    """

    row: Row
    group_id: str
    sample: int
    reasoning: str | None = None


class Runner:
    """Owns the event loop in which every episode and every engine call of a run lives."""

    def __init__(
        self,
        environment: Callable[[], Environment],
        limits: LimitsConfig,
        lockstep: Lockstep | None = None,
        concurrency: int | None = None,
    ) -> None:
        self.environment, self.limits, self.lockstep = environment, limits, lockstep
        # Time-outs count what an episode takes, not how long it queued behind others. In lockstep all go together.
        self._slots = asyncio.Semaphore(concurrency) if concurrency and lockstep is None else contextlib.nullcontext()
        self.activity = Activity()
        self.lost: Counter[str] = Counter()  # dropped episodes by cause
        self._failures = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout: float, what: str) -> Any:
        """Run a coroutine (an engine call) in the rollout loop and wait for it; the time-out names ``what``."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            if not future.done():
                future.cancel()
                raise WaitTimeout(f"{what} was not done after {timeout:.0f} s") from None
            raise

    def fill(
        self, buffer: RolloutBuffer, jobs: Iterable[Job], speaker: Callable[[], Speaker]
    ) -> list[tuple[Job, Future[Episode]]]:
        """Play jobs whose groups the buffer expects. Returns at once; what ends the run goes to ``buffer.fail``.

        A job whose future is cancelled counts as dropped.
        """

        def deliver(job: Job, future: Future[Episode]) -> None:
            try:
                buffer.add(future.result())
            except EpisodeDropped as error:
                buffer.drop(job.group_id, error.cause)
            except (FutureCancelled, asyncio.CancelledError):
                buffer.drop(job.group_id, "cancelled")
            except BaseException as error:
                buffer.fail(error)

        started = self._start(list(jobs), speaker)
        for job, future in started:
            future.add_done_callback(lambda done, job=job: deliver(job, done))
        return started

    def play(
        self, jobs: Iterable[Job], speaker: Callable[[], Speaker], progress: Callable[[int], None]
    ) -> list[Episode]:
        """Play jobs to their end and give the episodes in the jobs' order; dropped ones are left out."""
        episodes: list[Episode] = []
        started = self._start(list(jobs), speaker)
        try:
            for count, (_, future) in enumerate(started, 1):
                with contextlib.suppress(EpisodeDropped):
                    episodes.append(future.result())  # ends by itself: every wait inside has its own time-out
                progress(count)
        except BaseException:
            for _, other in started:
                other.cancel()
            raise
        return episodes

    def _start(self, jobs: list[Job], speaker: Callable[[], Speaker]) -> list[tuple[Job, Future[Episode]]]:
        if self.lockstep is not None:
            for job in jobs:  # all before the first speaks: batches then depend on the jobs alone
                self.lockstep.enter(program_id(job))
        return [(job, asyncio.run_coroutine_threadsafe(self._play(job, speaker), self._loop)) for job in jobs]

    async def _play(self, job: Job, speaker: Callable[[], Speaker]) -> Episode:
        try:
            async with self._slots:
                return await self.play_one(job, speaker)
        finally:
            if self.lockstep is not None:
                self.lockstep.leave(program_id(job))

    async def play_one(
        self,
        job: Job,
        speaker: Callable[[], Speaker],
        episode: Episode | None = None,
        opened: Callable[[Episode, asyncio.Timeout], None] = lambda episode, deadline: None,
        waiting: Callable[[bool], None] = lambda begins: None,
    ) -> Episode:
        """Play a job; whatever went wrong outside the policy is retried, then drops the episode.

        ``episode`` is one to go on with: a retry begins it anew. ``opened`` gets what each attempt plays; ``waiting``
        as for ``run_episode``.
        """
        try:
            for attempt in range(self.limits.retries + 1):
                if episode is None or attempt:
                    episode = Episode.begin(job.row, job.group_id, job.sample, job.reasoning)
                timed = functools.partial(opened, episode)
                try:
                    environment = self.environment()
                    await run_episode(
                        job.row,
                        environment,
                        speaker(),
                        self.limits,
                        episode=episode,
                        timed=timed,
                        waiting=waiting,
                        activity=self.activity,
                    )
                    break
                except (EpisodeDropped, EngineDied, UserError):
                    raise
                except Exception as error:
                    if attempt == self.limits.retries:
                        raise EpisodeDropped(type(error).__name__, f"{type(error).__name__}: {error}") from error
        except EpisodeDropped as error:
            self._failures += 1
            self.lost[error.cause] += 1
            if self._failures >= self.limits.max_failures_in_a_row:
                raise too_many_failures(self._failures, error) from error
            raise
        self._failures = 0
        assert episode is not None
        return episode

    def close(self) -> None:
        """Cancel what still runs and stop the thread."""

        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self._loop.is_running():
            self.call(cancel(), 30.0, "the end of the rollouts")
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30.0)


def concurrency(engine: Any) -> int:
    """Episodes to play at once so that the engine's batch stays full while tools run; ``engine``: its settings."""
    return 2 * engine.max_num_seqs * getattr(engine, "replicas", 1)


def too_many_failures(count: int, last: Exception) -> UserError:
    """The one line that stops a run whose episodes keep failing."""
    return UserError(f"{count} episodes in a row failed (limits.max_failures_in_a_row); the last: {last}")
