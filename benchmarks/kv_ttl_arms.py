"""What ``benchmarks.kv_ttl`` plays: sessions by seed, and a real vLLM engine in this process that serves them."""

from __future__ import annotations

import gc
import heapq
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rollout.scheduling.workloads import Session, Turn, Workload

BLOCK = 32  # tokens
VOCAB, FIRST_TOKEN = 8192, 8  # ids below the first are special
CALL, ANSWER = 3, FIRST_TOKEN  # what an output consists of: <tool_call>, which opens a call, or a word
MAX_MODEL_LEN = 4096
BATCH: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}  # what stock vLLM serves with on CPU
BIG: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}  # 31.5M parameters
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
TOOL = "tool"


@dataclass(frozen=True)
class Case:
    """Programs that start within ``arrivals`` seconds, each of ``turns`` turns. Ranges: tokens, seconds of a tool."""

    programs: int
    turns: int
    arrivals: float
    first: tuple[int, int] = (700, 1300)  # tokens of the first prompt: instructions and a task
    result: tuple[int, int] = (60, 180)  # of a tool's result
    output: tuple[int, int] = (14, 27)  # of a tool call
    gap: tuple[float, float] = (0.2, 5.0)  # log-uniform: most tools are short


PINNED = Case(12, 6, arrivals=10.0)  # the issue's, a third of whose working set is
POOL = 220  # blocks
SHORT = Case(8, 4, arrivals=5.0)  # of the curve over pool sizes
QUICK = Case(3, 2, arrivals=0.1, first=(60, 90), result=(30, 60), output=(4, 8), gap=(0.02, 0.1))
QUICK_POOL = 9  # blocks, of the 14 that they fill


def workload(case: Case, seed: int) -> Workload:
    """The sessions of a case by arrival, the same for every arm."""

    def session(index: int) -> Session:
        rng = np.random.default_rng([seed, index])
        turns = []
        for number in range(case.turns):
            prompt = int(rng.integers(*(case.result if number else case.first)))
            output, gap = int(rng.integers(*case.output)), float(np.exp(rng.uniform(*np.log(case.gap))))
            last = number + 1 == case.turns
            turns.append(Turn(prompt, output, 0.0 if last else gap, None if last else TOOL))
        return Session(tuple(turns), arrival=float(rng.uniform(0, case.arrivals)))

    sessions = sorted((session(i) for i in range(case.programs)), key=lambda session: session.arrival or 0.0)
    return Workload("kv_ttl", tuple(sessions))


def real_case_workload(seed: int) -> Workload:
    """The pinned case. ``real_case_engine`` is the engine that it runs on."""
    return workload(PINNED, seed)


def real_case_engine() -> dict[str, Any]:
    """Pool, blocks and batches of the pinned case, as ``rollout.scheduling.simulator.simulate`` takes them."""
    return {"pool_tokens": (POOL - 1) * BLOCK, "block_size": BLOCK, **BATCH}  # one block is vLLM's null block


def working_set(load: Workload) -> int:
    """Blocks that hold all sessions at their longest."""
    return sum(-(-session.tokens // BLOCK) for session in load.sessions)


def pool_blocks(load: Workload, share: float) -> int:
    """Blocks of a pool of that share of the working set, though no smaller than its longest session needs."""
    longest = max(-(-session.tokens // BLOCK) for session in load.sessions)
    return max(math.ceil(share * working_set(load)), longest + 2) + 1  # one block is vLLM's null block


def build_model(folder: Path, shape: dict[str, Any]) -> int:
    """Write a Qwen3 of random weights with a tokenizer of a word for each id; gives its parameters."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {"<tool_call>" if i == CALL else f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    heads = shape["hidden_size"] // 64
    config = Qwen3Config(
        vocab_size=VOCAB,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_MODEL_LEN,
        dtype=torch.float32,
        **shape,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


@dataclass
class Client:
    """A session as it plays. ``tokens``: its context so far."""

    index: int
    session: Session
    turn: int = -1
    tokens: list[int] = field(default_factory=list)
    state: str = "waiting"
    since: float = 0.0
    finish: float = 0.0


class RealEngine:
    """vLLM's ``LLMEngine`` in this process, one at a time. ``options`` None is stock: no scheduler class is named.

    Its scheduler's outputs are read as they pass, in every arm alike; times of steps and who runs come from there.
    """

    def __init__(self, model_dir: Path, blocks: int, options: dict[str, Any] | None) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        ours: dict[str, Any] = {}
        if options is not None:
            ours["scheduler_cls"] = "rollout.scheduling.vllm_plugin.program_scheduler"
            ours["additional_config"] = {"turnstile": options}
        arguments = EngineArgs(
            model=str(model_dir),
            generation_config="vllm",
            dtype="float32",
            max_model_len=min(MAX_MODEL_LEN, (blocks - 1) * BLOCK),
            block_size=BLOCK,
            num_gpu_blocks_override=blocks,
            kv_cache_memory_bytes=1 << 30,
            enforce_eager=True,
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            **BATCH,
            **ours,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        core: Any = self.engine.engine_core
        self.scheduler = core.engine_core.scheduler
        assert self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks == blocks
        self._schedule, self.scheduler.schedule = self.scheduler.schedule, self._watched
        self.scheduled: dict[str, int] = {}  # tokens of the step, by vLLM's request id
        self.computed = self.preemptions = 0
        self.steps: list[tuple[int, float, int, float]] = []  # prefill tokens, Σ of their contexts, running, seconds
        self._ended: float | None = None  # of the step before, if requests were left
        self._warm_up(blocks)

    def add(
        self, name: str, tokens: list[int], outputs: int, word: int, session: str | None, extra: dict[str, Any]
    ) -> str:
        """Send a request whose output is so many times ``word``; gives vLLM's own id of it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=outputs,
            ignore_eos=True,
            temperature=0.0,
            allowed_token_ids=[word],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra or None,
        )
        prompt: Any = {"type": "token", "prompt_token_ids": list(tokens)}
        return self.engine.add_request(name, prompt, sampling, session_id=session)

    @property
    def busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def step(self) -> list[Any]:
        """One engine step: the requests that it finished."""
        start = time.monotonic() if self._ended is None else self._ended
        finished = self.engine.step()
        end = time.monotonic()
        if self.scheduled:  # a policy may admit nobody although nothing runs; the engine looks again at once
            self.steps.append((*self._work, end - start))
        self._ended = end if self.busy else None
        return finished

    def close(self) -> None:
        self.engine.engine_core.shutdown()
        del self.engine, self.scheduler, self._schedule
        gc.collect()

    def _watched(self, *arguments: Any) -> Any:
        output = self._schedule(*arguments)
        self.scheduled = output.num_scheduled_tokens
        self.computed += output.total_num_scheduled_tokens
        self.preemptions += len(output.preempted_req_ids or ())
        prefill, context = 0, 0.0
        for name, n in self.scheduled.items():
            request = self.scheduler.requests[name]
            if n > 1 or request.num_output_tokens == 0:
                prefill += n
                context += n * (2 * request.num_computed_tokens - n + 1) / 2
        self._work = prefill, context, len(self.scheduled)
        return output

    def _warm_up(self, blocks: int) -> None:
        """The first batches of an engine are not timed. Nobody's tokens, no names, and nothing of it stays cached."""
        length = min(900, (blocks - 4) * BLOCK // 3)
        for batch in range(2):
            for i in range(3):
                self.add(f"warm{batch}-{i}", [FIRST_TOKEN + i] * (length * (8 - i) // 8), 12, ANSWER, None, {})
            while self.busy:
                self.step()
        assert self.engine.reset_prefix_cache()
        self.steps.clear()
        self.computed = self.preemptions = 0


def play(engine: RealEngine, load: Workload, seed: int, *, hints: bool = False) -> dict[str, Any]:
    """Play the sessions with real waiting. Times are seconds since the start; a tool begins when its turn came back.

    Clients name their session. That a tool was called, or that an answer is the last, is for the scheduler to read in
    the output. ``hints``: they also say which tool's result they bring, and which turn is their last.
    """
    clients = [Client(i, session) for i, session in enumerate(load.sessions)]
    rngs = [np.random.default_rng([seed, i, 1]) for i in range(len(clients))]
    due = [(session.arrival or 0.0, i) for i, session in enumerate(load.sessions)]
    heapq.heapify(due)
    live: dict[str, tuple[Client, str]] = {}  # by our request id; with vLLM's
    intervals: list[tuple[int, str, float, float]] = []
    pinned: dict[str, float] = {}
    recomputed = 0
    origin = time.monotonic()

    def clock() -> float:
        return time.monotonic() - origin

    def become(client: Client, state: str, when: float) -> None:
        if state != client.state:
            intervals.append((client.index, client.state, client.since, when))
            client.state, client.since = state, when

    def note_pins(when: float) -> None:
        now = {program.id for program in getattr(engine.scheduler, "programs", ()) if program.pins}
        for name in pinned.keys() - now:
            intervals.append((int(name), "pinned", pinned.pop(name), when))
        for name in now - pinned.keys():
            pinned[name] = when

    def ask(client: Client, when: float) -> None:
        client.turn += 1
        turn, last = client.session.turns[client.turn], client.turn + 1 == len(client.session.turns)
        client.tokens += rngs[client.index].integers(FIRST_TOKEN, VOCAB, turn.prompt).tolist()
        extra: dict[str, Any] = {"tool": TOOL} if hints and client.turn else {}
        if hints and last:
            extra["last_turn"] = True
        if client.turn:
            become(client, "waiting", when)
        else:
            client.since = when
        name = f"{client.index}-{client.turn}"
        live[name] = (
            client,
            engine.add(name, client.tokens, turn.output, ANSWER if last else CALL, str(client.index), extra),
        )

    while due or live:
        while due and due[0][0] <= clock():
            when, index = heapq.heappop(due)
            ask(clients[index], when)
        if not live:
            time.sleep(max(0.0, due[0][0] - clock()))
            continue
        before = clock()
        finished = engine.step()
        after = clock()
        for client, name in live.values():
            become(client, "running" if name in engine.scheduled else "waiting", max(before, client.since))
        for output in finished:
            client, _ = live.pop(output.request_id)
            turn, known = (
                client.session.turns[client.turn],
                len(client.tokens) - client.session.turns[client.turn].prompt,
            )
            # Of what it had said before all but the last token was computed at some time.
            recomputed += max(0, known - 1 - output.num_cached_tokens) if client.turn else 0
            client.tokens += output.outputs[0].token_ids
            client.finish = after
            if client.turn + 1 < len(client.session.turns):
                become(client, "tool", after)
                heapq.heappush(due, (after + turn.gap, client.index))
            else:
                intervals.append((client.index, client.state, client.since, after))
        note_pins(after)
    if hasattr(engine.scheduler, "counters"):  # ours read off the outputs where jobs end
        assert engine.scheduler.counters.jobs == len(clients)
    needed = sum(session.tokens - 1 for session in load.sessions)  # nobody reads the last token's KV
    return {
        "arrivals": [session.arrival for session in load.sessions],
        "finishes": [client.finish for client in clients],
        "gaps": [sum(turn.gap for turn in session.turns) for session in load.sessions],
        "recomputed": recomputed,
        "computed_again": engine.computed - needed,
        "preemptions": engine.preemptions,
        "steps": engine.steps,
        "intervals": intervals,
    }
