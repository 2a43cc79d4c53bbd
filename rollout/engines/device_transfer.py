"""Weights from the trainer's GPUs to the engines' by vLLM's own weight transfer. Not run on GPU.

``engine.transfer=nccl``: rank 0 broadcasts to engines that have GPUs of their own. ``ipc``: every process of the
trainer lays chunks in its GPU's memory, and the engine's worker on the same GPU reads them there. ``vllm_sender`` holds
what touches vLLM, whose import takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from rollout.config import VllmConfig
from rollout.engines.mailbox import within
from rollout.errors import UserError

if TYPE_CHECKING:
    from rollout.engines.remote import RemoteEngine
    from rollout.weights import Weights


class DeviceTransfer:
    """Rank 0's part: all weights to all ``engines`` at once. What runs there is frozen meanwhile."""

    def __init__(self, config: VllmConfig, engines: Sequence[RemoteEngine]) -> None:
        self._config = config
        self._engines = engines
        self._sender: Any = None

    async def send(self, weights: Weights, version: int) -> None:
        """Raises as soon as an engine does, even while NCCL goes on waiting for it; nothing can be sent after that."""
        outcome: Future[None] = Future()
        # A new thread's CUDA device is the first, as rank 0's is.
        threading.Thread(target=self._send, args=(weights, version, outcome), name="weights", daemon=True).start()
        what = f"weights of version {version} to arrive by engine.transfer={self._config.transfer}"
        await within(asyncio.wrap_future(outcome), self._config.timeout_s, what)

    def close(self) -> None:
        """Leave the engines, which must end too: NCCL may wait for them, so nobody waits for it."""
        if self._sender is not None:
            threading.Thread(target=self._sender.shutdown, name="weights", daemon=True).start()

    def _send(self, weights: Weights, version: int, outcome: Future[None]) -> None:
        try:
            if self._sender is None:
                self._sender = self._joined(weights, outcome)
            self._sender.send(weights, version, outcome)
        except BaseException as error:
            settle(outcome, error)
        else:
            settle(outcome)

    def _joined(self, weights: Weights, outcome: Future[None]) -> Any:
        from rollout.engines.vllm import environment

        with environment(self._engines[0].log_path):
            from rollout.engines.vllm_sender import Sender

            return Sender(self._config, self._engines, weights, outcome)


class Follower:
    """What another rank does while rank 0 sends by ``ipc``: the same, for its own GPU."""

    def __init__(self) -> None:
        self._sender: Any = None

    def send(self, weights: Weights) -> None:
        """Returns when rank 0's has."""
        if self._sender is None:
            from rollout.engines.vllm import environment

            with environment(None, {"VLLM_CONFIGURE_LOGGING": "0"}):
                from rollout.engines.vllm_sender import ipc_follower

                self._sender = ipc_follower(weights)
        self._sender.send_weights()


def settle(outcome: Future[None], error: BaseException | None = None) -> None:
    """The first word counts; who waited may have gone."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            outcome.set_result(None)
        else:
            outcome.set_exception(error)


def transfer_variables(config: VllmConfig) -> dict[str, str]:
    """Environment variables of the engine's processes: handles of CUDA IPC travel to vLLM's workers as pickles."""
    return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if config.transfer == "ipc" else {}


def check_transfer(config: Any) -> None:
    """Refuse a training engine's ``transfer`` that this machine cannot do, before anything starts. Not run on GPU."""
    if config.transfer == "file":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"engine.transfer: {config.transfer} needs CUDA, and this machine has none; take engine.transfer=file"
        )
    if config.url is not None:
        return
    trained = set(range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    devices = config.devices or range(config.replicas * config.tensor_parallel_size)
    shared, alone = sorted(trained & set(devices)), sorted(set(devices) - trained)
    if config.transfer == "nccl" and shared:
        raise UserError(
            f"engine.transfer: nccl is for engines with GPUs of their own, and {shared} are trained on; "
            "name others by engine.devices, or take engine.transfer=ipc"
        )
    if config.transfer == "ipc" and alone:
        raise UserError(
            f"engine.transfer: ipc is for engines on the trainer's GPUs, and {alone} are not; take engine.transfer=nccl"
        )
