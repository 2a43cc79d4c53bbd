"""The policy's weights as a weight sync reads them: merged, whole, as often as asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from training.lora import merged_weights, plain_parameters
from training.sharding import whole_shape


class PolicyWeights:
    """``rollout.weights.Weights`` of a model, with or without an adapter, spread over processes or not."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(self.model)

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, value.dtype, whole_shape(value)) for name, value, _ in plain_parameters(self.model)]
