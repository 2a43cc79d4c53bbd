"""From losses of tokens to one loss: a weight for every own token, over a whole optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Aggregation = Literal["token", "sequence", "constant"]


def token_weights(
    lengths: Sequence[int],
    mode: Aggregation,
    *,
    max_tokens: int | None = None,
    total_tokens: int | None = None,
    total_sequences: int | None = None,
) -> list[np.ndarray]:
    """Weights such that the step's loss is the sum of weight x loss over all own tokens of all ranks.

    - ``token``: 1 / own tokens of the step (DAPO, arXiv 2503.14476 §3.3; TRL's ``dapo``).
    - ``sequence``: 1 / (sequences x own tokens of the sequence): the mean of means (GRPO; TRL's ``grpo``).
    - ``constant``: 1 / (sequences x ``max_tokens``), whatever the lengths (Dr. GRPO, arXiv 2503.20783; TRL's
      ``dr_grpo``).

    Args:
        lengths: own tokens of every sequence of this rank. A sequence without any counts as a sequence.
        max_tokens: own tokens that a sequence may have at most; ``constant`` needs it.
        total_tokens, total_sequences: sums over all ranks; None: this rank is the only one.

    Returns:
        Per sequence a float64 array of its length.

    Raises:
        ValueError: unknown mode, negative length, a total below this rank's own, or ``constant`` without max_tokens.
    """
    own_tokens = sum(lengths)
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths {min(lengths)} must not be negative; count the own tokens of each sequence")
    tokens = own_tokens if total_tokens is None else total_tokens
    sequences = len(lengths) if total_sequences is None else total_sequences
    if tokens < own_tokens or sequences < len(lengths):
        raise ValueError(
            f"totals of {tokens} tokens and {sequences} sequences are below this rank's {own_tokens} and "
            f"{len(lengths)}; sum them over all ranks"
        )
    match mode:
        case "token":
            return [np.full(length, 1 / max(tokens, 1)) for length in lengths]
        case "sequence":
            return [np.full(length, 1 / (sequences * max(length, 1))) for length in lengths]
        case "constant":
            if max_tokens is None or max_tokens <= 0:
                raise ValueError(f"max_tokens={max_tokens}: constant aggregation needs the longest length allowed")
            return [np.full(length, 1 / (sequences * max_tokens)) for length in lengths]
    raise ValueError(f"aggregation {mode!r} is not one of token, sequence, constant")
