"""What CUDA does in vLLM's weight transfer, done on CPU: broadcasts by vLLM's own store, shared memory by files.

Everything else is vLLM's and ours: its trainer and worker engines, their packed chunks, the meeting, the client.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer import packed_tensor

SHARED: dict[int, tuple[str, BinaryIO]] = {}  # address of a buffer → its file, by a path that other processes find


class StoreCommunicator:
    """In the place of ``PyNcclCommunicator``. ``sent``: bytes of each broadcast from this process."""

    sent: list[int] = []  # noqa: RUF012 - read by the tests

    def __init__(self, group: Any, device: int) -> None:
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        received = self.group.broadcast(tensor, src)
        if received is tensor:
            self.sent.append(tensor.nbytes)
        else:
            tensor.copy_(received)

    def destroy(self) -> None:
        pass


class Stream:
    def synchronize(self) -> None:
        pass


def stand_in(patch: Callable[[Any, str, Any], None], gpu: str) -> None:
    """Replace CUDA in this process by ``patch``: ``setattr``, or a monkeypatch's. ``gpu`` is its device's name."""
    empty = torch.empty

    def empty_on_gpu(*size: Any, device: Any = None, **keywords: Any) -> torch.Tensor:
        return shared_buffer(*size) if device == "cuda" else empty(*size, device=device, **keywords)

    patch(torch, "empty", empty_on_gpu)
    patch(torch.accelerator, "current_device_index", lambda: 0)
    patch(torch.accelerator, "synchronize", lambda *device: None)
    patch(torch.cuda, "stream", lambda stream: nullcontext())
    patch(torch.cuda, "current_stream", lambda *device: Stream())
    patch(torch.cuda, "synchronize", lambda: None)
    patch(torch.cuda, "ipc_collect", lambda: None)
    patch(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=gpu))
    patch(packed_tensor, "_get_streams", lambda index, count: (Stream(),) * count)
    patch(packed_tensor, "reduce_tensor", lambda tensor: (None, handle(tensor)))
    patch(torch.multiprocessing.reductions, "rebuild_cuda_tensor", lambda path, size, *rest: mapped(path, size))
    patch(pynccl, "PyNcclCommunicator", StoreCommunicator)


def shared_buffer(size: int) -> torch.Tensor:
    file = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 - open as long as others may ask for it
    file.truncate(size)
    path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    tensor = mapped(path, size)
    SHARED[tensor.data_ptr()] = (path, file)
    return tensor


def mapped(path: str, size: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def handle(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Laid out as ``reduce_tensor`` gives it: the receiver writes its device's number at index 6."""
    path, _ = SHARED[tensor.data_ptr()]
    return (path, tensor.numel(), torch.uint8, None, None, None, 0)


def gpu_of_environment() -> str:
    """The device that a fleet gave its member."""
    return "GPU-" + os.environ.get("CUDA_VISIBLE_DEVICES", "0")
