"""Callbacks of transformers' Trainer that the loop itself needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class UpdateCallback(TrainerCallback):
    """Calls ``updated`` when the optimizer has stepped: transformers gives its Trainer no other place for that."""

    def __init__(self, updated: Callable[[], None]) -> None:
        self.updated = updated

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updated()
