"""The trainer's side of vLLM's own weight transfer: its NCCL and CUDA IPC engines, fed and steered. Not run on GPU.

Imports vLLM. Everything that moves a weight is vLLM's; here are the source that it reads, and the client by which it
talks to engines of ours.
"""

from __future__ import annotations

import asyncio
import base64
import math
import pickle
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_ip, get_open_port

from rollout.config import VllmConfig
from rollout.engines.device_transfer import settle
from rollout.engines.remote import RemoteEngine
from rollout.engines.weight_files import CHUNK_BYTES
from rollout.weights import Weights

LOCAL = "127.0.0.1"


class Source(WeightSource):
    """The trainer's weights as vLLM reads them: on this process's GPU, one after the other."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*entry) for entry in self.weights.metadata()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, tensor in self.weights:
            yield name, tensor.to(device)  # those of a model that does not train yet, and offloaded ones, are on CPU


class Client:
    """vLLM's ``VLLMWeightSyncClient`` for engines of ours: every call goes to all and returns when all have answered.

    A call that fails settles ``outcome`` too: the thread that asked may be one that vLLM does not look at.
    """

    def __init__(self, engines: Sequence[RemoteEngine], sizes: Sequence[int]) -> None:
        """``sizes``: workers of each engine."""
        self.version = 0
        self.outcome: Future[None] = Future()
        self._engines = engines
        self._sizes = sizes

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self._engines]
        if "rank_offset" in init_info:  # where vLLM means the first engine's workers to begin
            for i, info in enumerate(infos):
                info["rank_offset"] += sum(self._sizes[:i])
        given = dict(zip(self._engines, infos, strict=True))
        self._each(lambda engine: engine.join_transfer(given[engine]))

    def start_weight_update(self) -> None:
        self._each(lambda engine: engine.begin_update())

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        assert isinstance(update_info, dict)
        info = {name: value for name, value in update_info.items() if value is not None}
        if "ipc_handles" in info:
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(info.pop("ipc_handles"))).decode()
        self._each(lambda engine: engine.send_update(info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's own trainers give no version: it is ``self.version``."""
        self._each(lambda engine: engine.end_update(self.version))

    def _each(self, call: Callable[[RemoteEngine], Awaitable[None]]) -> None:
        async def calls() -> None:
            await asyncio.gather(*(call(engine) for engine in self._engines))

        try:
            asyncio.run(calls())
        except BaseException as error:
            settle(self.outcome, error)
            raise


class Sender:
    """vLLM's trainer engine on rank 0, once it has met the workers of all ``engines``. Every call blocks."""

    def __init__(
        self, config: VllmConfig, engines: Sequence[RemoteEngine], weights: Weights, outcome: Future[None]
    ) -> None:
        sizes = asyncio.run(world_sizes(engines))
        self._source = Source(weights)
        self._client = Client(engines, sizes)
        self._client.outcome = outcome
        info = ipc_info(0, weights) if config.transfer == "ipc" else nccl_info(config.url, sum(sizes), weights)
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)

    def send(self, weights: Weights, version: int, outcome: Future[None]) -> None:
        """``outcome`` hears of an engine's failure at once; this may go on waiting for that engine in NCCL."""
        self._source.weights, self._client.version, self._client.outcome = weights, version, outcome
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # vLLM reads on streams of its own what the optimizer has just written
        self._trainer.send_weights()

    def shutdown(self) -> None:
        self._trainer.shutdown()


def ipc_follower(weights: Weights) -> TrainerWeightTransferEngine[Any]:
    """vLLM's trainer engine on any other rank, which lends its GPU's memory and talks to no engine."""
    info = ipc_info(torch.distributed.get_rank(), weights)
    return WeightTransferTrainerFactory.trainer_init(info, client=Client([], []), source=Source(weights))


async def world_sizes(engines: Sequence[RemoteEngine]) -> list[int]:
    return await asyncio.gather(*(engine.world_size() for engine in engines))


def nccl_info(url: str | None, workers: int, weights: Weights) -> NCCLTrainerInitInfo:
    """Rank 0 and all ``workers`` in one NCCL group, which meets on this machine. ``url``: of a server that we join."""
    far = url is not None and urlsplit(url).hostname not in ("localhost", LOCAL)
    return NCCLTrainerInitInfo(
        master_address=get_ip() if far else LOCAL,
        master_port=get_open_port(),
        world_size=1 + workers,
        packed=True,
        packed_buffer_size_bytes=buffer_bytes(weights),
        rank=0,
    )


def ipc_info(rank: int, weights: Weights) -> IPCTrainerInitInfo:
    return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=buffer_bytes(weights), rank=rank)


def buffer_bytes(weights: Weights) -> int:
    """Of a chunk, into which the largest weight must fit: CUDA IPC refuses it otherwise. Equal on all ranks."""
    return max(CHUNK_BYTES, *(math.prod(shape) * dtype.itemsize for _, dtype, shape in weights.metadata()))
