"""Agent loop against raw ``vllm.LLM.generate`` replaying the same turns and lengths: tokens per second.

A tiny model learns the tool format, then plays arithmetic with the calculator (a tool of no time). Two processes take
turns, each with its own in-process vLLM of the same settings: ours plays a batch of episodes, raw vLLM replays it. The
replay makes one ``LLM.generate`` call per turn of the batch; an episode's next prompt is what raw vLLM itself wrote
plus the tokens that the agent loop injected, so that both find the same prefixes in the cache. Lengths are forced,
log-probs are on in both. Raw vLLM is stock: nothing of this project runs in its process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.report import Report

Turns = list[tuple[list[int], int]]  # per turn: tokens injected before it, length written

BAR = 0.8
TRAIN_STEPS = 300


def settings() -> Any:
    from rollout.config import VllmConfig

    return VllmConfig(max_model_len=512, max_num_seqs=128, kv_cache_gib=0.5)


def prepare(model_dir: Path, steps: int) -> None:
    """A tiny model that has learnt the format from demonstrations that call the tool; answers need not be right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollout.chat import Chat
    from rollout.tasks.arithmetic import Arithmetic
    from training.models import build_tiny

    task = Arithmetic()
    build_tiny(model_dir, task.corpus())
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chat = Chat(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    demonstrations = (x for x in task.demonstrations(10**9) if x.style == "tool")
    for _ in range(steps):
        rows = [chat.demonstration(x.messages, x.tools) for x, _ in zip(demonstrations, range(32), strict=False)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for i, (tokens, own) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, : len(tokens)] = torch.where(torch.tensor(own), torch.tensor(tokens), -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(model_dir)


class AgentArm:
    """The whole path of a rollout: environment, chat format, engine, parser, tool, verifier."""

    def __init__(self, model_dir: Path, log_path: Path) -> None:
        from transformers import AutoTokenizer

        from rollout.chat import Chat
        from rollout.config import LimitsConfig
        from rollout.engines import Sampling
        from rollout.engines.vllm import build
        from rollout.runner import Runner
        from rollout.speaker import Policy
        from rollout.tasks.arithmetic import Arithmetic

        self.task = Arithmetic()
        self.engine = build(settings(), str(model_dir), log_path=log_path)
        self.runner = Runner(self.task.environment, LimitsConfig(max_turns=4, max_tool_calls=3, max_new_tokens=128))
        chat = Chat(AutoTokenizer.from_pretrained(model_dir))
        self.policy = Policy(self.engine, chat, Sampling(max_tokens=1), settings().max_model_len)
        self.row = 0

    def play(self, episodes: int, samples: int) -> dict[str, Any]:
        from rollout.runner import Job

        rows = self.task.rows("train")
        groups = [rows[(self.row + i) % len(rows)] for i in range(episodes // samples)]
        self.row += len(groups)
        jobs = [Job(row, row.id, sample) for row in groups for sample in range(samples)]
        start = time.perf_counter()
        played = self.runner.play(jobs, self.policy.speaker, lambda done: None)
        seconds = time.perf_counter() - start
        turns = [turns_of(episode.sequences[0]) for episode in played]
        return {"seconds": seconds, "tokens": sum(x.own_tokens for x in played), "turns": turns}


def turns_of(sequence: Any) -> Turns:
    """A sequence as its turns: what was injected, and how much was written."""
    turns: Turns = []
    injected: list[int] = []
    length = 0
    for token, own in zip(sequence.token_ids, sequence.own_mask, strict=True):
        if own:
            length += 1
            continue
        if length:
            turns.append((injected, length))
            injected, length = [], 0
        injected.append(token)
    return [*turns, (injected, length)] if length else turns


class RawArm:
    """Stock vLLM's offline entry point."""

    def __init__(self, model_dir: Path) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        from vllm import LLM

        from rollout.engines.vllm import engine_arguments

        arguments = engine_arguments(settings(), str(model_dir))
        del arguments["weight_transfer_config"]  # the name is known only where our plug-in is active
        self.llm = LLM(**arguments)

    def play(self, episodes: list[Turns]) -> dict[str, Any]:
        from vllm import SamplingParams

        histories: list[list[int]] = [[] for _ in episodes]
        tokens = 0
        start = time.perf_counter()
        for turn in range(max(len(turns) for turns in episodes)):
            live = [i for i, turns in enumerate(episodes) if turn < len(turns)]
            prompts, params = [], []
            for i in live:
                injected, length = episodes[i][turn]
                histories[i] += injected
                prompts.append({"prompt_token_ids": list(histories[i])})
                params.append(
                    SamplingParams(
                        max_tokens=length,
                        ignore_eos=True,
                        temperature=1.0,
                        logprobs=0,
                        flat_logprobs=True,
                        detokenize=False,
                    )
                )
            for i, output in zip(live, self.llm.generate(prompts, params, use_tqdm=False), strict=True):
                histories[i] += output.outputs[0].token_ids
                tokens += len(output.outputs[0].token_ids)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


def serve(arm: str, model_dir: Path) -> None:
    """A worker: one JSON line in, one batch played, one JSON line out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not mix with the replies
    if arm == "agent":
        agent = AgentArm(model_dir, model_dir.parent / "engine.log")
    else:
        raw = RawArm(model_dir)
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        result = agent.play(**batch) if arm == "agent" else raw.play(**batch)
        print(json.dumps(result), file=replies, flush=True)


class Worker:
    """The other end of ``serve``."""

    def __init__(self, arm: str, model_dir: Path, log: IO[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.rollout_throughput", "--arm", arm, "--model", str(model_dir)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; see arms.log in the benchmark's folder")
        return json.loads(line)

    def play(self, **batch: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(batch), file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small batches of an untrained format, no bars")
    parser.add_argument("--episodes", type=int, default=256, help="per batch")
    parser.add_argument("--samples", type=int, default=8, help="episodes per question")
    parser.add_argument("--batches", type=int, default=9, help="timed batches of each arm")
    parser.add_argument("--arm", choices=["agent", "raw"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.arm:
        serve(options.arm, options.model)
        return

    report = Report("rollout_throughput")
    episodes, batches, steps = (16, 1, 40) if options.quick else (options.episodes, options.batches, TRAIN_STEPS)
    folder = Path("outputs/benchmarks/rollout_throughput")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, (folder / "arms.log").open("w") as log:
        model_dir = Path(scratch) / "model"
        report.console.print(f"teaching a tiny model the format, {steps} steps …", style="dim")
        prepare(model_dir, steps)
        workers: list[Worker] = []
        try:
            agent = Worker("agent", model_dir, log)
            workers.append(agent)
            raw = Worker("raw", model_dir, log)
            workers.append(raw)
            rows = []
            for batch in range(batches + 2):  # the first two of each process are not timed
                ours = agent.play(episodes=episodes, samples=options.samples)
                theirs = raw.play(episodes=ours["turns"])
                assert ours["tokens"] == theirs["tokens"], "the replay wrote other lengths"
                if batch < 2:
                    continue
                turns = statistics.mean(len(x) for x in ours["turns"])
                speeds = ours["tokens"] / ours["seconds"], theirs["tokens"] / theirs["seconds"]
                rows.append((batch - 1, ours["tokens"], turns, *speeds, speeds[0] / speeds[1]))
        finally:
            for worker in workers:
                worker.close()
    columns = ["batch", "tokens", "turns per episode", "agent loop tokens/s", "raw vLLM tokens/s", "ratio"]
    report.table(f"{episodes} episodes a batch", columns, rows)
    for name, column in (("tokens", 1), ("turns", 2), ("agent_tokens_per_s", 3), ("raw_tokens_per_s", 4), ("ratio", 5)):
        report.figure(name, statistics.median(row[column] for row in rows))
    report.bar("ratio", ">=", BAR)
    report.finish(options.quick)


if __name__ == "__main__":
    main()
