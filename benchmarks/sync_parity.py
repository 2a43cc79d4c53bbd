"""After real optimizer steps and a weight sync, do engine and trainer agree? Every engine member, tied and untied.

Each arm starts an engine on an untrained model, trains the model by AdamW until its log-probs have moved, syncs, and
compares log-probs of fixed and of sampled tokens, and greedy text; then once more: a second sync takes other paths.
The bf16 arm has no bar of the issue: it measures what the probe's default bound for bf16 must allow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import run_arms
from benchmarks.report import Report

MEMBERS = ("in_process", "process", "http", "transformers")
BOUND = 1e-4
ROUNDS = 2
STEPS = 12
GREEDY_TOKENS = 32


def corpus() -> list[str]:
    return [f"{a} + {b} = {a + b}. {a} times {b} is {a * b}." for a in range(1, 30) for b in range(1, 30)]


def build_engine(member: str, dtype: str, model_dir: Path, log_path: Path) -> Any:
    from rollout.config import TransformersConfig, VllmConfig

    if member == "transformers":
        from rollout.engines.transformers import build

        return build(TransformersConfig(dtype=dtype), str(model_dir), log_path=log_path)
    from rollout.engines.vllm import build

    return build(VllmConfig(mode=member, dtype=dtype, kv_cache_gib=0.25), str(model_dir), log_path=log_path)


def train(model: Any, optimizer: Any, batches: list[Any]) -> None:
    """Next-token AdamW steps: what moves the weights in earnest."""
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The trainer's own greedy continuation, one full forward pass per token."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def furthest(a: list[list[float]], b: list[list[float]]) -> float:
    return max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


async def arm(member: str, tied: bool, dtype: str) -> dict[str, Any]:
    """One engine: differences and moves in nats, the larger and the smaller of all rounds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from rollout.engines import Sampling
    from rollout.weights import model_logprobs, named_weights
    from training.models import build_tiny

    logging.disable_progress_bar()
    texts = corpus()
    difference, move, equal, text = 0.0, float("inf"), True, ""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = build_tiny(Path(folder) / "model", texts, tied=tied)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rows = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        probe = [tokenizer(x).input_ids for x in texts[:: len(texts) // 8]]
        prompts = [tokenizer(x[:6]).input_ids for x in texts[:: len(texts) // 6]]
        generator = torch.Generator().manual_seed(0)
        engine = build_engine(member, dtype, model_dir, Path(folder) / "engine.log")
        try:
            for version in range(1, ROUNDS + 1):
                before = model_logprobs(model, probe)
                draws = torch.randint(len(rows), (STEPS, 16), generator=generator)
                train(model, optimizer, [rows[draw] for draw in draws])
                await engine.update_weights(named_weights(model), version)
                after = model_logprobs(model, probe)
                move = min(move, furthest(before, after))
                scores = await asyncio.gather(*(engine.score(ids) for ids in probe))
                difference = max(difference, furthest(after, scores))
                calls = (engine.generate(ids, Sampling(24), program_id=str(i)) for i, ids in enumerate(prompts))
                for prompt, out in zip(prompts, await asyncio.gather(*calls), strict=True):
                    ours = model_logprobs(model, [prompt + out.ids])[0][len(prompt) - 1 :]
                    difference = max(difference, furthest([ours], [out.logprobs]))
                sampling = Sampling(max_tokens=GREEDY_TOKENS, temperature=0.0)
                calls = (engine.generate(ids, sampling, program_id=str(i)) for i, ids in enumerate(prompts))
                for prompt, out in zip(prompts, await asyncio.gather(*calls), strict=True):
                    ours = tokenizer.decode(greedy(model, prompt, GREEDY_TOKENS))
                    text = tokenizer.decode(out.ids)
                    equal = equal and ours == text and out.versions == [version] * GREEDY_TOKENS
        finally:
            await engine.close()
    return {"difference": difference, "move": move, "greedy_equal": equal, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the transformers engine alone, no bars")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.arm:
        print(json.dumps(asyncio.run(arm(**json.loads(options.arm)))))
        return

    report = Report("sync_parity")
    members = ("transformers",) if options.quick else MEMBERS
    arms = {
        f"{member}_{'tied' if tied else 'untied'}": {"member": member, "tied": tied, "dtype": "float32"}
        for member in members
        for tied in (True, False)
    }
    if not options.quick:
        arms["in_process_bf16"] = {"member": "in_process", "tied": True, "dtype": "bfloat16"}
    results = dict(run_arms("sync_parity", arms, lambda text: report.console.print(text, style="dim")))
    rows = [
        (name, x["move"], x["difference"], "equal" if x["greedy_equal"] else "DIFFERS") for name, x in results.items()
    ]
    report.table(
        f"engine against trainer after {STEPS} optimizer steps and a sync, {ROUNDS} times",
        ["engine", "log-probs moved by (nats)", "largest difference (nats)", "greedy text"],
        rows,
    )
    for name, result in results.items():
        report.figure(f"{name}_difference", result["difference"])
    exact = {name: result for name, result in results.items() if arms[name]["dtype"] == "float32"}
    report.figure("largest_difference", max(x["difference"] for x in exact.values()))
    report.figure("smallest_move", min(x["move"] for x in exact.values()))
    report.figure("greedy_equal", float(all(x["greedy_equal"] for x in exact.values())))
    report.figure("arms", len(exact))
    report.bar("largest_difference", "<=", BOUND)
    report.bar("smallest_move", ">=", 0.1)
    report.bar("greedy_equal", "==", 1.0)
    report.finish(options.quick)


if __name__ == "__main__":
    main()
