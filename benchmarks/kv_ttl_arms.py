"""How ``benchmarks.kv_ttl`` plays its sessions: a real vLLM engine in this process whose scheduler is exchanged."""

from __future__ import annotations

import gc
import heapq
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv_ttl_cases import BATCH, BLOCK, TOOL
from rollout.scheduling.workloads import Session, Workload

PLUG_IN = "rollout.scheduling.vllm_plugin.program_scheduler"
VOCAB, FIRST_TOKEN = 8192, 8  # ids below the first are special
CALL, ANSWER = 3, FIRST_TOKEN  # what an output consists of: <tool_call>, which opens a call, or a word
MAX_MODEL_LEN = 4096
BIG: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}  # 31.5M parameters
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


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
    """vLLM's ``LLMEngine`` in this process, one at a time. ``use`` gives it the scheduler of an arm.

    Two engines of the same settings differ by several percent in their steps' times: arms share one. The scheduler's
    outputs are read as they pass, in every arm alike; times of steps and who runs come from there.
    """

    def __init__(self, model_dir: Path, blocks: int) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

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
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        engine_core: Any = self.engine.engine_core
        self.core = engine_core.engine_core
        self.blocks = blocks

    def use(self, options: dict[str, Any] | None) -> None:
        """Exchange the scheduler, and the cache with it, as ``EngineCore`` builds it; None is stock's own class."""
        from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

        old, config = self.core.scheduler, self.core.vllm_config
        assert not old.has_requests()
        old.shutdown()
        config.scheduler_config.scheduler_cls = None if options is None else PLUG_IN
        config.additional_config = {} if options is None else {"turnstile": options}
        block_size, hash_block_size = resolve_kv_cache_block_sizes(old.kv_cache_config, config)
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=old.kv_cache_config,
            structured_output_manager=self.core.structured_output_manager,
            include_finished_set=False,
            log_stats=self.core.log_stats,
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        self.core.scheduler = self.scheduler
        assert self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks == self.blocks
        self._schedule, self.scheduler.schedule = self.scheduler.schedule, self._watched
        self.scheduled: dict[str, int] = {}  # tokens of the step, by vLLM's request id
        self.computed = self.preemptions = 0
        self.steps: list[tuple[int, float, int, float]] = []  # prefill tokens, Σ of their contexts, running, seconds
        self._ended: float | None = None  # of the step before, if requests were left
        self._warm_up()

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

    def flush(self) -> None:
        """Let the worker forget who has finished: a scheduler says it with its next step."""
        while self.scheduler.has_requests():
            self.engine.step()

    def close(self) -> None:
        self.engine.engine_core.shutdown()
        del self.engine, self.core, self.scheduler, self._schedule
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

    def _warm_up(self) -> None:
        """A scheduler's first batches are not timed. Nobody's tokens, no names, and nothing of it stays cached."""
        length = min(900, (self.blocks - 4) * BLOCK // 3)
        for batch in range(2):
            for i in range(3):
                self.add(f"warm{batch}-{i}", [FIRST_TOKEN + i] * (length * (8 - i) // 8), 12, ANSWER, None, {})
            while self.busy:
                self.step()
        self.flush()
        assert self.engine.reset_prefix_cache()
        gc.collect()  # of what the scheduler before left
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
    engine.flush()
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
