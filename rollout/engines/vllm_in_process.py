"""vLLM in this process: ``LLMEngine.step()`` on a thread of its own. For CPU and tests."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.config import VllmConfig
from rollout.engines import Generation, vllm_plugin
from rollout.engines.adapter import lora_request
from rollout.engines.threaded import Running, ThreadedEngine
from rollout.engines.vllm import (
    SCORING_FIELDS,
    engine_arguments,
    environment,
    generation,
    refusals,
    sampling_fields,
    sampling_params,
)
from rollout.errors import UserError
from rollout.scheduling.programs import RELEASE

if TYPE_CHECKING:
    import torch
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

_live = threading.Lock()  # vLLM keeps one set of process groups per process


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """vLLM seeds the generators of the process that it starts in; put them back, for they are the trainer's."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class InProcessEngine(ThreadedEngine):
    """An ``Engine`` on ``LLMEngine``; a process can hold one at a time."""

    name = "vLLM"

    def __init__(self, config: VllmConfig, model_dir: str, log_path: Path | None) -> None:
        self._model_dir = model_dir
        self._log_path = log_path
        self._adapter: LoRARequest | None = None
        super().__init__(config, model_dir)

    def _open(self) -> None:
        if not _live.acquire(blocking=False):
            raise UserError("engine.mode: one in_process engine lives here already; close it, or use mode=process")
        try:
            self._start()
        except BaseException:
            _live.release()
            raise

    def _start(self) -> None:
        with own_randomness(), environment(self._log_path), refusals():
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
            from vllm.v1.executor import Executor

            vllm_plugin.register()  # vLLM calls it once per process, perhaps before this engine
            vllm_config = EngineArgs(**engine_arguments(self.config, self._model_dir)).create_engine_config()
            self._engine: LLMEngine = LLMEngine(
                vllm_config, Executor.get_class(vllm_config), log_stats=False, multiprocess_mode=False
            )
        self._engine.set_weight_version(str(self.version))

    def _add(self, key: str, running: Running) -> None:
        request = running.request
        running.internal_id = self._engine.add_request(
            key,
            {"type": "token", "prompt_token_ids": running.ids},
            sampling_params(SCORING_FIELDS if request is None else sampling_fields(request)),
            lora_request=self._adapter,
            priority=0 if request is None else request.priority,
            session_id=None if request is None else request.program_id,
        )

    async def release(self, program_id: str) -> None:
        if self.config.scheduler_cls is not None:
            await self._ask(lambda: self._engine.engine_core.abort_requests([RELEASE + program_id]), "a release")

    def _step(self) -> None:
        for output in self._engine.step():
            key = output.request_id
            if self._running[key].request is None:
                self._done(key, list(output.prompt_logprobs.logprobs))
            else:
                self._done(key, generation(output.outputs[0], output.num_cached_tokens or 0))

    def _cut(self, key: str, running: Running) -> Generation:
        from vllm.v1.engine import FinishReason

        state = self._engine.output_processor.request_states[running.internal_id]
        output = state.make_request_output([], None, FinishReason.ABORT, None)
        self._engine.abort_request([running.internal_id], internal=True)
        return generation(output.outputs[0], output.num_cached_tokens or 0)

    def _load(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(stream)})
        self._loaded(version)

    async def load_adapter(self, folder: Path, version: int) -> None:
        """Load between two steps; later tokens of running requests carry the new version."""

        def load() -> None:
            self._engine.add_lora(lora_request(folder))
            self._adapter = lora_request()
            self._loaded(version)
            self.version = version

        await self._ask(load, f"the adapter of version {version} to load")

    def _loaded(self, version: int) -> None:
        if not self.config.keep_cache:
            self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(version))

    def _sleep(self, level: int) -> None:
        self._engine.sleep(level)

    def _wake(self, tags: list[str] | None) -> None:
        self._engine.wake_up(tags)

    def _usage(self) -> float:
        return self._engine.engine_core.engine_core.scheduler.kv_cache_manager.usage

    def _shut(self) -> None:
        self._engine.engine_core.shutdown()
        del self._engine
        _live.release()
