"""Whole training steps on a tool-free task, ours against ``trl.GRPOTrainer``: samples per second.

Every arm is a process of its own (``benchmarks/step_arms.py``) that starts from the same checkpoint, a 0.4M-parameter
policy after the arithmetic task's warm start without tools, and trains on the same questions: 32 prompts x 8 samples a
step, at most 96 tokens each, temperature 1, fp32, token-mean clipped loss (0.2, 0.28), no KL, one AdamW update a batch.
The reward is random: it varies in every group, so that nothing can be skipped, and lengths stay what they are. Only one
arm runs at a time: it does a few steps and waits for its next turn, round robin over all arms and thread counts, so
that the machine's moods meet all alike. An arm's first steps are never timed. A step's time is that between two ends of
steps, everything included; ours is the real ``python -m training`` run, with its weight probe and its logs.

Answers differ in length, as in every real task, and that decides: TRL pads all samples to the longest one, in
generation and in training. ``--untrained`` shows the other end, a policy that writes 32 tokens of noise whatever it is
asked: all lengths are equal there, padding costs nothing, and padded ``generate`` was the faster (0.9 in a short run
on a busy machine). Its figures have no bar.

What TRL gets: its fastest settings that we found, and every arm its best thread count. ``trl_generate`` is padded
``generate``, ``trl_continuous`` transformers' continuous batching with room for the whole batch; the faster of the two
is judged. ``trl_vllm`` is ``vllm_mode="colocate"`` in process, with the cure without which its weights stay those of
the first step on CPU (``rollout.engines.vllm_plugin.keep_weights``) and with our own engine's settings;
``trl_vllm_compiled`` is the same under vLLM's torch.compile. Gradient checkpointing, completion logs, vLLM's
detokenisation and the importance-sampling correction (a second forward pass) are off. The whole batch is one
micro-batch: four of 64 cost the same. What we give ourselves: micro-batches of 4096 tokens in rows of 64.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import STORE, code
from benchmarks.report import Report
from benchmarks.step_arms import TIMEOUT_S, build_model, work
from rollout.errors import UserError, WaitTimeout

OURS, STOCK, VLLM = ("ours",), ("trl_generate", "trl_continuous"), ("trl_vllm", "trl_vllm_compiled")
FAMILIES = {"ratio_to_trl": STOCK, "ratio_to_trl_vllm": VLLM}
BARS = {"ratio_to_trl": 1.5, "ratio_to_trl_vllm": 1.1}
THREADS = (1, 2)
WARM_START = 400  # steps, as in the quickstart: after fewer, stray samples run to the limit and padding costs more


class Worker:
    """The other end of ``work``."""

    def __init__(self, settings: dict[str, Any], model_dir: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").symlink_to(model_dir)
        os.environ["OMP_NUM_THREADS"] = str(settings["threads"])  # read by the child before it imports torch
        spawning = multiprocessing.get_context("spawn")
        self.name, self.log = folder.name, folder / "log"
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=work, args=(theirs, settings, folder))
        self.process.start()
        theirs.close()

    def read(self) -> Any:
        if not self.pipe.poll(TIMEOUT_S):
            raise WaitTimeout(f"arm {self.name} said nothing for {TIMEOUT_S:.0f} s: {self.tail()}")
        try:
            return self.pipe.recv()
        except EOFError:
            raise UserError(f"arm {self.name} ended: {self.tail()}") from None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def steps(self, n: int) -> list[float]:
        """Seconds of each of the next ``n`` steps."""
        self.pipe.send(n)
        return self.read()

    def stop(self) -> dict[str, Any]:
        """End the arm; gives what it says of its work."""
        self.pipe.send(0)
        about = self.read()
        self.process.join(30)
        return about

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def prepare(folder: Path, batch: dict[str, int]) -> Path:
    """The checkpoint that all arms start from, made in a process of its own: this one stays small and idle."""
    if not (folder / "model").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.environ["OMP_NUM_THREADS"] = "1"
        process = multiprocessing.get_context("spawn").Process(target=build_model, args=(folder, batch))
        process.start()
        process.join(2 * TIMEOUT_S)
        if process.exitcode != 0:
            process.kill()
            raise UserError(f"no checkpoint to start from: its process ended with {process.exitcode}")
    return (folder / "model").absolute()


def measure(arms: dict[str, dict[str, Any]], rounds: int, steps: int, folder: Path, note: Any) -> dict[str, Any]:
    """Rounds of ``steps`` steps of every arm; those that a stopped run left in ``folder`` are not run again.

    Gives ``rounds``, a list of {arm: seconds of each step}, and ``about``, what each arm says of its work.
    """
    store = folder / "rounds.json"
    kept = json.loads(store.read_text()) if store.exists() else {"rounds": []}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            note("the policy to start from")
            model_dir = prepare(folder / "start", next(iter(arms.values()))["batch"])
            for name, settings in arms.items():
                note(f"starting {name}")
                workers[name] = Worker(settings, model_dir, Path(scratch) / name)
                workers[name].read()
            while len(kept["rounds"]) < rounds:
                turn = len(kept["rounds"]) % len(arms)  # nobody is always first
                order = [*arms][turn:] + [*arms][:turn]
                kept["rounds"].append({name: workers[name].steps(steps) for name in order})
                store.write_text(json.dumps(kept))
                note(f"round {len(kept['rounds'])} of {rounds}")
            kept["about"] = {name: worker.stop() for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    return kept


def show(report: Report, arms: dict[str, dict[str, Any]], kept: dict[str, Any], samples: int) -> None:
    """Tables of speed and of work, and the ratios."""
    seconds = {name: [x for turn in kept["rounds"] for x in turn[name]] for name in arms}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name in arms:
        report.figure(f"{name}_samples_per_s", samples / median[name])
    rows = [(n, samples / median[n], median[n], min(seconds[n]), max(seconds[n])) for n in arms]
    columns = ["arm_threads", "samples/s", "s a step (median)", "fastest", "slowest"]
    report.table(f"{len(kept['rounds'])} rounds, {samples} samples a step", columns, rows)
    about = ["completion", "truncated", "varied", "weights_moved", "weights_off"]
    rows = [(name, *(kept["about"][name].get(key, "") for key in about)) for name in arms]
    columns = ["arm_threads", "tokens a sample", "cut at the limit", "groups that vary", "weights moved by (nats)"]
    report.table("equal work, and an engine that follows", [*columns, "engine off by (nats)"], rows)

    def best(family: Sequence[str]) -> str | None:
        return min((n for n in arms if arms[n]["arm"] in family), key=lambda n: median[n], default=None)

    for figure, family in FAMILIES.items():
        ours, theirs = best(OURS), best(family)
        if ours is None or theirs is None:
            continue
        turns = [statistics.median(turn[theirs]) / statistics.median(turn[ours]) for turn in kept["rounds"]]
        ratio = report.figure(figure, median[theirs] / median[ours])
        report.figure(f"{figure}_lowest_round", min(turns))
        text = f"{figure}: {ours} against {theirs}: {ratio:.2f} (rounds {min(turns):.2f} to {max(turns):.2f})"
        report.console.print(text, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ours and padded generate, two small steps, no bars")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each arm")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn")
    parser.add_argument("--untrained", action="store_true", help="32 tokens of noise, all of one length; no bars")
    parser.add_argument("--arms", nargs="+", choices=OURS + STOCK + VLLM, help="only these; no bars")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, help="thread counts that every arm tries")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    report = Report("step_vs_trl")

    batch = {"prompts": 32, "samples": 8, "tokens": 96, "warm_start": WARM_START}
    if options.untrained:
        batch |= {"tokens": 32, "warm_start": 0}
    warm, rounds, steps = 3, options.rounds, options.steps
    names, threads = options.arms or OURS + STOCK + VLLM, options.threads
    if options.quick:
        batch, warm, rounds, steps = {"prompts": 4, "samples": 4, "tokens": 8, "warm_start": 0}, 1, 1, 2
        names, threads = ("ours", "trl_generate"), (1,)
    arms = {f"{a}_{t}": {"arm": a, "threads": t, "batch": batch, "warm": warm} for a in names for t in threads}
    key = hashlib.sha256(json.dumps([arms, steps, code()]).encode()).hexdigest()[:12]
    folder = STORE / "step_vs_trl" / key
    folder.mkdir(parents=True, exist_ok=True)
    kept = measure(arms, rounds, steps, folder, lambda text: report.console.print(f"{text} …", style="dim"))
    shutil.rmtree(folder)
    show(report, arms, kept, batch["prompts"] * batch["samples"])
    judged = not (options.quick or options.untrained or options.arms)
    if judged:
        for figure, bound in BARS.items():
            report.bar(figure, ">=", bound)
    report.finish(quick=not judged)


if __name__ == "__main__":
    main()
