"""This process among those that train one run, and the objects that go between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from rollout.checkpoint import first_line
from rollout.errors import UserError, WaitTimeout

T = TypeVar("T")


class Ranks:
    """Objects between the processes of a run; with one process every call gives what it was given.

    Every process must call the same methods in the same order. They go by gloo, also where gradients go by NCCL: a
    wait for rank 0's rollouts then keeps no GPU busy.
    """

    def __init__(self, timeout_s: float = 7200.0) -> None:
        """Joins the processes that torchrun or ``accelerate launch`` have started."""
        self.rank, self.size = (
            int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
        )
        self.timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = None
        if self.size == 1:
            return
        limit = timedelta(seconds=timeout_s)
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
            try:
                dist.init_process_group(backend, timeout=limit)
            except dist.DistNetworkError as error:
                address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
                raise UserError(
                    f"rank {self.rank} cannot meet the others at {address} ({first_line(error)}); give another "
                    "--master-port, or torchrun --standalone, which takes a free one"
                ) from error
        self._group = dist.new_group(backend="gloo", timeout=limit)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, value: T | None = None) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        if self._group is not None:
            with self.waiting("word from rank 0"):
                dist.broadcast_object_list(box, src=0, group=self._group)
        return cast(T, box[0])

    def scatter(self, values: Sequence[T] | None = None) -> T:
        """Entry ``rank`` of rank 0's ``values``, which are ``size`` many."""
        if self._group is None:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        given = None if values is None else list(values)
        with self.waiting("work from rank 0"):
            dist.scatter_object_list(box, given, src=0, group=self._group)
        return cast(T, box[0])

    def gather(self, value: T) -> list[T]:
        """On rank 0 every rank's value, by rank; nothing on the others."""
        if self._group is None:
            return [value]
        found: list[Any] | None = [None] * self.size if self.leads else None
        with self.waiting("the other ranks"):
            dist.gather_object(value, found, dst=0, group=self._group)
        return found or []

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside it a process that has ended, or is silent for too long, is one line; other errors stay what they are.

        Raises UserError where what the ranks have between them broke, WaitTimeout where nothing came.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in text):
                raise
            if "timed out" in text:
                raise WaitTimeout(f"rank {self.rank} waited {self.timeout_s:.0f} s for {what}") from error
            raise UserError(
                f"rank {self.rank} lost {what}: a process of this run has ended, and its own last line says why; "
                "resume=true goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        """Leave; a process that ends without it makes others print warnings."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group()
            self._group = None
