"""transformers' continuous batching behind the Engine protocol: runs where there is no vLLM.

What it can do per request is a temperature, stop tokens and a length. It refuses top_p, top_k and min_p, and it has no
seeds: ``Sampling.seed`` is ignored. Prefixes are not shared (its cache could not be dropped at a sync), so
``cached_tokens`` is always 0. Written for transformers 5.17 to 5.19, whose loop it steps itself; not run on GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.config import TransformersConfig
from rollout.engines import Engine, Generation
from rollout.engines.mailbox import Request
from rollout.engines.threaded import Running, ThreadedEngine
from rollout.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

GREEDY_TEMPERATURE = 1e-6  # sampling at it picks the largest logit; the log-probs are then taken from a plain forward


def build(config: TransformersConfig, model_dir: str, *, log_path: Path | None = None) -> Engine:
    """Load a Hugging Face folder. ``log_path`` is there for symmetry with vLLM: this engine prints nothing."""
    return TransformersEngine(config, model_dir)


class TransformersEngine(ThreadedEngine):
    """An ``Engine`` on ``ContinuousBatchingManager``, stepped by this engine's thread instead of its own."""

    name = "transformers"

    def __init__(self, config: TransformersConfig, model_dir: str) -> None:
        self._model_dir = model_dir
        super().__init__(config, model_dir)

    def _open(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.utils import logging

        config = self.config
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            self._model_dir, dtype=getattr(torch, config.dtype), attn_implementation="sdpa"
        )
        self._model.to(device).eval().requires_grad_(False)
        # Scores come from a second set of modules on the same parameters, since batching changes the attention.
        self._scorer = copy.deepcopy(self._model, {id(p): p for p in self._model.parameters()})
        # A float32 engine cannot run on flash attention, which some versions take wherever they find it.
        names = {field.name for field in fields(ContinuousBatchingConfig)}
        chosen = {"auto_switch_to_flash": False} if "auto_switch_to_flash" in names else {}
        if not chosen:
            self._model.set_attn_implementation("paged|sdpa")
        pages = "page_size" if "page_size" in names else "block_size"
        self._manager = self._model.init_continuous_batching(
            # A processor exists only where the default is not neutral; every request then brings its temperature.
            GenerationConfig(do_sample=True, temperature=0.5, top_k=0, top_p=1.0, eos_token_id=-1, max_new_tokens=1),
            ContinuousBatchingConfig(
                num_blocks=config.num_blocks,
                max_batch_tokens=config.max_num_batched_tokens,
                max_requests_per_batch=config.max_num_seqs,
                allow_block_sharing=False,
                use_async_batching=False,
                return_logprobs=True,
                per_request_processors=True,
                **{pages: config.block_size},
                **chosen,
            ),
        )
        self._batches = self._manager._create_batch_processor()
        self._manager.batch_processor = self._batches
        self._manager.current_batch = 0

    def _add(self, key: str, running: Running) -> None:
        request = running.request
        if request is None:
            self._done(key, self._logprobs(running.ids))
            return
        problem = refused(request)
        if problem is not None:
            self._done(key, UserError(problem))
            return
        self._manager.add_request(
            running.ids,
            request_id=key,
            max_new_tokens=min(request.sampling.max_tokens, self.config.max_model_len - len(running.ids)),
            eos_token_id=list(request.sampling.stop_token_ids) or -1,
            temperature=float(request.sampling.temperature) or GREEDY_TEMPERATURE,
        )

    def _step(self) -> None:
        self._manager._generation_loop_body(self._batches, bootstrapping=False)
        outputs = self._manager.output_router.output_queue
        while not outputs.empty():
            output = outputs.get()
            running = self._running.get(output.request_id)
            if running is None:
                continue
            if output.error is not None:
                self._done(output.request_id, RuntimeError(f"transformers gave up a request: {output.error}"))
                continue
            stopped = output.generated_tokens[-1] in running.request.sampling.stop_token_ids
            self._done(output.request_id, self._generation(running, output, "stop" if stopped else "length"))

    def _cut(self, key: str, running: Running) -> Generation:
        state = self._state(key)
        self._manager.cancel_request(key)
        if state is None:
            return Generation([], [], "abort", [])
        return self._generation(running, state.to_generation_output(), "abort")

    def _load(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy into the parameters in place. Requests that run keep the cache of the old weights."""
        import torch

        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in stream:
                if name not in parameters:
                    raise UserError(f"engine: the model has no weight {name!r}; send transformers' names")
                parameters[name].copy_(tensor)
        if torch.cuda.is_available():  # batches are computed on a stream of their own, which would not wait
            torch.cuda.synchronize()
        for key, running in self._running.items():
            state = self._state(key)
            written = 0 if state is None else len(state.to_generation_output().generated_tokens)
            running.spans.append((self.version, written))

    async def load_adapter(self, folder: Path, version: int) -> None:
        """Refused: every request of a batch is answered by the model's own weights."""
        raise UserError("lora.sync: the transformers engine takes whole weights; take lora.sync=merged, or engine=vllm")

    def _sleep(self, level: int) -> None:
        """Memory stays where it is: transformers cannot give it back and take it again."""

    def _wake(self, tags: list[str] | None) -> None:
        """Nothing was given back."""

    def _usage(self) -> float:
        blocks = sum(state.allocated_blocks for state in self._batches.scheduler.active_requests.values())
        return blocks / self.config.num_blocks

    def _shut(self) -> None:
        self._manager.destroy()
        del self._manager, self._batches, self._model, self._scorer

    def _state(self, key: str) -> RequestState | None:
        scheduler = self._batches.scheduler
        return scheduler.active_requests.get(key) or scheduler.waiting_requests.get(key)

    def _generation(self, running: Running, output: GenerationOutput, finish: str) -> Generation:
        ids = output.generated_tokens
        logprobs = output.logprobs
        if running.request.sampling.temperature == 0 and ids:
            logprobs = self._logprobs(running.ids + ids)[len(running.ids) - 1 :]
        versions: list[int] = []
        for version, end in [*running.spans, (self.version, len(ids))]:
            versions += [version] * (end - len(versions))
        return Generation(ids=ids, logprobs=logprobs, finish=finish, versions=versions)

    def _logprobs(self, ids: list[int]) -> list[float]:
        from rollout.weights import model_logprobs

        return model_logprobs(self._scorer, [ids])[0]


def refused(request: Request) -> str | None:
    """What continuous batching cannot do for a single request, in one line, or None."""
    sampling = request.sampling
    for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if getattr(sampling, name) != neutral:
            return f"sampling.{name}: the transformers engine samples the full distribution; use engine=vllm"
    return None
