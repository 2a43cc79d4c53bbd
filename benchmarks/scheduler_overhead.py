"""Time of one ``schedule()`` call with 500 pins held, ours against stock.

vLLM's real scheduler and KV cache manager without a model (``rollout.scheduling.virtual_engine``). "1,000 running and
waiting requests" has two readings, and both are measured: 500 run and 500 wait, and 1,000 of each. Requests wait for
one of two reasons, and both are measured:

- ``seats``: as many run as ``max_num_seqs`` allows, and nobody looks at the waiting queue.
- ``memory``: the head of the queue is refused in every step for lack of blocks. That is the worst case for ours: in
  every step it asks each pin in vain whether it may go. The head is older than all pins, and no pin is past its
  break-even, so that no shorter way to the answer "none" helps.

Both twins play the same requests, all of named programs; what runs decodes one token a step. The pool of stock is
smaller by the blocks that ours has pinned, so that both have the same blocks free. The twins take turns, step by step;
a round builds new ones, and its ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from typing import Any

from benchmarks.arms import run_arms
from benchmarks.report import Report

BAR = 1.05
SIZES = (500, 1000)  # requests that run, and as many that wait
REASONS = ("seats", "memory")
PINS, ROUNDS, STEPS = 500, 5, 100
WARM = 10  # steps of a twin that are not timed
BLOCK, PROMPT = 16, 512  # tokens
ENDLESS = 1e9  # break-even of turnstile, so that pins are asked and none goes


class Twin:
    """One scheduler in the state to be measured. ``seconds`` of its ``schedule`` calls."""

    def __init__(self, policy: str, reason: str, requests: int, pins: int, steps: int) -> None:
        from rollout.scheduling.costs import Linear
        from rollout.scheduling.virtual_engine import VirtualEngine, build_scheduler
        from rollout.scheduling.vllm_plugin import program_scheduler

        ours = policy != "fcfs"
        outputs = WARM + steps + 4  # none ends while we look
        room = requests * (outputs // BLOCK + 2)  # blocks for what runs to grow into; the head asks for more than that
        self.scheduler = build_scheduler(
            program_scheduler,
            num_blocks=requests * (PROMPT // BLOCK) + room + (pins * (PROMPT // BLOCK) if ours else 0),
            block_size=BLOCK,
            max_num_seqs=requests if reason == "seats" else 2 * requests,
            max_num_batched_tokens=1 << 20,
            options={"turnstile": {"policy": policy} | ({"k": ENDLESS} if ours else {})},
        )
        self.engine = VirtualEngine(self.scheduler, Linear(), scale=1, block_size=BLOCK)
        # First turns that wait would be express and take the pins: who waits has had one, too short to be kept.
        waiters = [self._ask(f"waits{i}", BLOCK // 2, 2) for i in range(requests)]
        self._finish()
        for i in range(pins):
            self._ask(f"pinned{i}", PROMPT, 2)
        self._finish()
        for i in range(requests):
            self._ask(f"runs{i}", PROMPT, outputs)
        self.engine.step()
        for i, context in enumerate(waiters):
            self._ask(f"waits{i}", PROMPT if i else (room + 64) * BLOCK, 2, context)
        self.seconds: list[float] = []
        self._schedule, self.scheduler.schedule = self.scheduler.schedule, self._timed
        for _ in range(WARM):
            self.engine.step()
        self.check(requests, pins if ours else 0)
        self.seconds.clear()

    def check(self, requests: int, pins: int) -> None:
        """The state that was asked for."""
        there = len(self.scheduler.running), len(self.scheduler.waiting), len(getattr(self.scheduler, "pins", ()))
        assert there == (requests, requests, pins), f"running, waiting and pins are {there}"

    def _ask(self, name: str, prompt: int, outputs: int, context: Any = None) -> Any:
        context = context or self.engine.context(())
        length = context.ask(None, prompt, outputs)
        self.engine.submit(
            f"{name}-{length}",
            context,
            length,
            outputs,
            owner=None,
            arrival=self.engine.now,
            session_id=name,
            extra_args=None,
        )
        return context

    def _finish(self) -> None:
        while self.engine.live:
            self.engine.step()

    def _timed(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        output = self._schedule(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return output


def measure(reason: str, requests: int, pins: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds a call by twin, one median a round."""
    found: dict[str, list[float]] = {"fcfs": [], "turnstile": []}
    for number in range(rounds):
        names = list(found) if number % 2 else list(found)[::-1]  # who is built later finds its objects elsewhere
        twins = {name: Twin(name, reason, requests, pins, steps) for name in names}
        gc.collect()
        gc.freeze()  # as vLLM's engine core does
        for step in range(steps):
            for name in names if step % 2 else names[::-1]:
                twins[name].engine.step()
        gc.unfreeze()
        for name, twin in twins.items():
            twin.check(requests, pins if name == "turnstile" else 0)
            found[name].append(statistics.median(twin.seconds) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40 requests, 20 pins, one round, no bars")
    parser.add_argument("--arm", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.arm:
        print(json.dumps(measure(**options.arm)))
        return

    report = Report("scheduler_overhead")
    sizes, pins, rounds, steps = ((40,), 20, 1, 10) if options.quick else (SIZES, PINS, ROUNDS, STEPS)
    arms = {
        f"{reason}_{size}": {"reason": reason, "requests": size, "pins": pins, "rounds": rounds, "steps": steps}
        for reason in REASONS
        for size in sizes
    }
    rows = []
    for name, found in run_arms("scheduler_overhead", arms, report.console.print):
        stock, ours = found["fcfs"], found["turnstile"]
        ratios = [a / b for a, b in zip(ours, stock, strict=True)]
        ratio = statistics.median(ratios)
        rows.append((name, statistics.median(stock), statistics.median(ours), ratio, min(ratios), max(ratios)))
        report.figure(f"stock_ms_{name}", statistics.median(stock))
        report.figure(f"ratio_{name}", ratio)
        report.bar(f"ratio_{name}", "<=", BAR)
    columns = ["waiting for_requests", "stock ms", "ours ms", "ratio", "lowest round", "highest"]
    report.table(f"a schedule() call, {pins} pins, {rounds} rounds of {steps} steps", columns, rows)
    report.finish(options.quick)


if __name__ == "__main__":
    main()
