"""Time of one ``schedule()`` call with 500 pins held, ours against stock.

vLLM's real scheduler and KV cache manager without a model (``rollout.scheduling.virtual_engine``). "1,000 running and
waiting requests" has two readings, and both are measured: 500 run and 500 wait, and 1,000 of each. So are three states:

- ``seats``: as many run as ``max_num_seqs`` allows, and nobody looks at the waiting queue.
- ``turnover``: five requests end in each step and are pinned, and five of the queue take their seats and their pins.
- ``memory``: the head of the queue is refused in every step for lack of blocks, and asks the pins in vain. It is older
  than all of them, and none is past its break-even: ours weighs them once, and again when one is added or due.

Both twins play the same requests, all of named programs; what runs decodes one token a step. Where memory is short the
pool of stock is smaller by the blocks that ours has pinned, so that both have the same blocks free; elsewhere it holds
all that there is. The twins take turns, step by step; a round builds new ones, and its ratio is that of the medians.
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
STATES = ("seats", "turnover", "memory")
PINS, ROUNDS, STEPS = 500, 5, 90
TURNOVER = 5  # requests that end in a step
WARM = 10  # steps of a twin that are not timed
BLOCK, PROMPT = 16, 512  # tokens
ENDLESS = 1e9  # break-even of turnstile, so that pins are asked and none goes


class Twin:
    """One scheduler in the state to be measured. ``seconds`` of its ``schedule`` calls."""

    def __init__(self, policy: str, state: str, requests: int, pins: int, steps: int) -> None:
        from rollout.scheduling.costs import Linear
        from rollout.scheduling.virtual_engine import VirtualEngine, build_scheduler
        from rollout.scheduling.vllm_plugin import program_scheduler

        ours, short = policy != "fcfs", state == "memory"
        self.outputs = WARM + steps + 4  # nothing ends while we look, but where it is to
        room = requests * (self.outputs // BLOCK + 2)  # blocks for what runs to grow into; the head asks for more
        kept = pins if ours else 0
        more = 0 if short else pins + 2 * requests  # programs that wait or have ended: ample memory
        self.scheduler = build_scheduler(
            program_scheduler,
            num_blocks=(requests + kept) * (PROMPT // BLOCK) + room + more * ((PROMPT + self.outputs) // BLOCK + 2),
            block_size=BLOCK,
            max_num_seqs=2 * requests if short else requests,
            max_num_batched_tokens=1 << 20,
            options={"turnstile": {"policy": policy} | ({"k": ENDLESS} if ours else {})},
        )
        steps_alone = Linear(a=0.01, b=0.0, c=0.0, d=0.0)  # little time passes: patience and idle pins stay out of it
        self.engine = VirtualEngine(self.scheduler, steps_alone, scale=1, block_size=BLOCK)
        self.seconds: list[float] = []
        self._schedule, self.scheduler.schedule = self.scheduler.schedule, self._timed
        # Who waits has had a turn, too short to be kept: first turns that wait would be express and take the pins.
        waiters = [self._ask(f"waits{i}", BLOCK // 2, 2) for i in range(requests)]
        self._finish()
        pinned = [self._ask(f"pinned{i}", PROMPT, 2) for i in range(pins)]
        self._finish()
        for i in range(requests):
            self._ask(f"runs{i}", PROMPT, i // TURNOVER + 2 if state == "turnover" else self.outputs)
        self.engine.step()
        if state == "turnover":
            for i, context in enumerate(pinned):
                self._ask(f"pinned{i}", BLOCK, self.outputs, context)
        for i, context in enumerate(waiters[: requests - pins if state == "turnover" else requests]):
            self._ask(f"waits{i}", PROMPT if i or not short else (room + 64) * BLOCK, self.outputs, context)
        self.check(requests, pins if ours else 0)
        for _ in range(WARM):
            self.engine.step()
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


def measure(state: str, requests: int, pins: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds a call by twin, one median a round."""
    found: dict[str, list[float]] = {"fcfs": [], "turnstile": []}
    for number in range(rounds):
        names = list(found) if number % 2 else list(found)[::-1]  # who is built later finds its objects elsewhere
        twins = {name: Twin(name, state, requests, pins, steps) for name in names}
        gc.collect()
        gc.freeze()  # as vLLM's engine core does
        for step in range(steps):
            for name in names if step % 2 else names[::-1]:
                twins[name].engine.step()
            assert twins["fcfs"].engine.scheduled.keys() == twins["turnstile"].engine.scheduled.keys()
        gc.unfreeze()
        for name, twin in twins.items():
            if state != "turnover":
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
        f"{state}_{size}": {"state": state, "requests": size, "pins": pins, "rounds": rounds, "steps": steps}
        for state in STATES
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
    columns = ["state_requests", "stock ms", "ours ms", "ratio", "lowest round", "highest"]
    report.table(f"a schedule() call, {pins} pins, {rounds} rounds of {steps} steps", columns, rows)
    report.finish(options.quick)


if __name__ == "__main__":
    main()
