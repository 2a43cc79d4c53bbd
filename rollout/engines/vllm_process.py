"""vLLM with its engine core in a process of its own: ``AsyncLLM``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rollout.config import VllmConfig
from rollout.engines import Generation, PauseMode
from rollout.engines.adapter import lora_request
from rollout.engines.device_transfer import transfer_variables
from rollout.engines.mailbox import Request
from rollout.engines.remote import RemoteEngine
from rollout.engines.vllm import (
    SCORING_FIELDS,
    engine_arguments,
    environment,
    generation,
    refusals,
    sampling_fields,
    sampling_params,
)
from rollout.scheduling.programs import RELEASE

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


class ProcessEngine(RemoteEngine):
    """An ``Engine`` on ``AsyncLLM``, whose asyncio objects live on this engine's loop."""

    def __init__(
        self,
        config: VllmConfig,
        model_dir: str,
        log_path: Path | None,
        version: int = 0,
        own: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``own``: environment variables of the engine's process alone."""
        super().__init__(config, model_dir, log_path, version)
        self._adapter: LoRARequest | None = None
        # For good: a core that has them gives answers that only a client with them reads.
        os.environ.update(transfer_variables(config))
        try:
            with environment(log_path, own), refusals():
                from vllm.engine.arg_utils import AsyncEngineArgs

                vllm_config = AsyncEngineArgs(**engine_arguments(config, model_dir)).create_engine_config()
                self._llm: AsyncLLM = self._start(self._open(vllm_config))
        except RuntimeError as error:  # vLLM's word for a core that ended while it started
            raise self._died(error) from error

    async def _open(self, vllm_config: object) -> AsyncLLM:
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import Executor

        llm = AsyncLLM(vllm_config, Executor.get_class(vllm_config), log_stats=False, log_requests=False)
        await llm.update_weight_version(str(self.version))
        return llm

    async def _generate(self, request: Request, request_id: str) -> Generation:
        output = await self._last(request.ids, sampling_params(sampling_fields(request)), request_id, request)
        return generation(output.outputs[0], output.num_cached_tokens or 0)

    async def _score(self, ids: list[int], request_id: str) -> list[float]:
        output = await self._last(ids, sampling_params(SCORING_FIELDS), request_id, None)
        return list(output.prompt_logprobs.logprobs)

    async def _last(
        self, ids: list[int], params: SamplingParams, request_id: str, request: Request | None
    ) -> RequestOutput:
        from vllm.v1.engine.exceptions import EngineDeadError

        session = {} if request is None else {"priority": request.priority, "session_id": request.program_id}
        prompt = {"type": "token", "prompt_token_ids": ids}
        try:
            async for output in self._llm.generate(prompt, params, request_id, lora_request=self._adapter, **session):
                if output.finished:
                    return output
        except EngineDeadError as error:
            raise self._died(error) from error
        raise self._died("a request ended without an output")

    async def _abort(self, request_ids: list[str]) -> None:
        await self._llm.abort(request_ids)

    async def _release(self, program_id: str) -> None:
        # Not abort_requests_async: with several engine cores the client drops ids that it does not know.
        await self._llm.engine_core.call_utility_async("abort_requests", [RELEASE + program_id])

    async def _set_paused(self, mode: PauseMode | None) -> None:
        await self._alive()
        if mode is None:
            await self._llm.resume_generation()
        else:
            await self._llm.pause_generation(mode=mode, clear_cache=False)

    async def _world_size(self) -> int:
        return self._llm.vllm_config.parallel_config.world_size_across_dp

    async def _join_transfer(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._alive()
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(info))

    async def _start_update(self) -> None:
        await self._alive()
        await self._llm.start_weight_update()

    async def _send_update(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(info))

    async def _finish_update(self, version: int) -> None:
        await self._llm.finish_weight_update(str(version))

    async def _load_adapter(self, folder: Path, version: int) -> None:
        await self._alive()
        await self._llm.add_lora(lora_request(folder))
        await self._llm.update_weight_version(str(version))
        self._adapter = lora_request()

    async def _drop_cache(self) -> None:
        if not self.config.keep_cache:
            await self._llm.reset_prefix_cache(reset_running_requests=True)

    async def _sleep(self, level: int) -> None:
        await self._llm.sleep(level)

    async def _wake(self, tags: list[str] | None) -> None:
        await self._llm.wake_up(tags)

    async def _health(self) -> None:
        await self._alive()

    async def _alive(self) -> None:
        if self._llm.errored:
            raise self._died(self._llm.dead_error)

    def _stop(self) -> None:
        async def shutdown() -> None:
            self._llm.shutdown()
            del self._llm  # its finalizer must run before the interpreter goes

        self._start(shutdown())
