"""Muon for hidden matrices, AdamW for the rest, as one optimizer that schedulers and trainers can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon on every matrix but embeddings and head; torch.optim.AdamW on those and on vectors."""

    def __init__(self, model: torch.nn.Module, lr: float, adam_lr: float) -> None:
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            outer = "embed" in name or "lm_head" in name
            (others if parameter.ndim != 2 or outer else matrices).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([{"params": matrices, "lr": lr}, {"params": others, "lr": adam_lr}], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both parts, at the rates that a scheduler has set on ``param_groups``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"parts": [part.state_dict() for part in self.parts], "groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        for group, saved in zip(self.param_groups, state_dict["groups"], strict=True):
            group.update(saved)
