"""Ragged sequences to packed micro-batches and back. Targets and per-token arrays are shifted here, and only here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rollout.episode import Sequence as EpisodeSequence

IGNORED = -100  # no target


@dataclass
class TrainSequence:
    """One sequence as training sees it; every array has length n, one entry per token.

    ``advantages``, ``behaviour_logprobs`` and ``weights`` (of the aggregation) are 0 on tokens that the policy did not
    write, ``versions`` -1. ``index`` is unique in a call of ``pack``.
    """

    token_ids: np.ndarray
    own_mask: np.ndarray
    advantages: np.ndarray
    behaviour_logprobs: np.ndarray
    weights: np.ndarray
    index: int
    versions: np.ndarray

    def __post_init__(self) -> None:
        names = ("own_mask", "advantages", "behaviour_logprobs", "weights", "versions")
        lengths = {name: len(getattr(self, name)) for name in names}
        if set(lengths.values()) != {len(self.token_ids)}:
            raise ValueError(
                f"sequence {self.index}: {len(self.token_ids)} token_ids but {lengths}; give one entry each"
            )
        if len(self.token_ids) == 0 or self.own_mask[0]:
            raise ValueError(f"sequence {self.index} must open with a token of its prompt: nothing predicts the first")

    @classmethod
    def of(cls, sequence: EpisodeSequence, index: int, advantages: np.ndarray, weights: np.ndarray) -> TrainSequence:
        """From a rollout's sequence, with one advantage and one weight per *own* token.

        ``train_prompt_ids`` takes the place of the sampled prompt where it is given.
        """
        prompt = sequence.token_ids[: sequence.prompt_length]
        if sequence.train_prompt_ids is not None:
            prompt = sequence.train_prompt_ids
        rest = slice(sequence.prompt_length, None)
        own = np.array([False] * len(prompt) + sequence.own_mask[rest], dtype=bool)
        logprobs = [x for x, mine in zip(sequence.behaviour_logprobs, sequence.own_mask, strict=True) if mine]
        return cls(
            token_ids=np.array(prompt + sequence.token_ids[rest], dtype=np.int64),
            own_mask=own,
            advantages=_on_own(own, advantages),
            behaviour_logprobs=_on_own(own, np.array(logprobs, dtype=np.float64)),
            weights=_on_own(own, weights),
            index=index,
            versions=np.array([-1] * len(prompt) + sequence.versions[rest], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class MicroBatch:
    """Packed rows; every tensor has shape (rows, row_length).

    Position i of a row holds token i of some sequence in ``input_ids`` and ``position_ids`` (0, 1, ... per sequence),
    and, in all other fields, what belongs to the token it predicts, i + 1 of the same sequence: ``targets`` (-100 at
    a sequence's last token and on padding), ``policy_mask`` (the policy wrote the target), ``advantages``,
    ``behaviour_logprobs``, ``weights``. ``sequence_ids`` is the sequence's ``index``, -1 on padding. Padding
    stands at the end of a row only and goes on counting positions, so that a row of one sequence needs no mask.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    policy_mask: torch.Tensor
    advantages: torch.Tensor
    behaviour_logprobs: torch.Tensor
    weights: torch.Tensor
    sequence_ids: torch.Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """The entries of a (rows, row_length) tensor whose targets the policy wrote: flat, row by row."""
        return values[self.policy_mask]

    @property
    def shape(self) -> tuple[int, int]:
        rows, length = self.input_ids.shape
        return rows, length


def pack(
    sequences: Sequence[TrainSequence], *, max_tokens: int, row_tokens: int | None = None, pad_id: int
) -> list[MicroBatch]:
    """Pack into micro-batches of at most ``max_tokens`` positions, padding included; the same input packs the same way.

    Sequences go by first fit, longest first, into rows of at most ``row_tokens``; a longer one has a row to itself, so
    ``row_tokens=1`` packs nothing. Rows of like length share a micro-batch. Default: ``max_tokens``, one row a
    micro-batch, as variable-length attention wants it; under SDPA attention costs the square of the row.

    Raises:
        ValueError: a sequence longer than ``max_tokens``, or two with one index.
    """
    if len({sequence.index for sequence in sequences}) != len(sequences):
        raise ValueError("two sequences have one index; number them within the call")
    rows: list[list[TrainSequence]] = []
    room: list[int] = []
    capacity = min(row_tokens or max_tokens, max_tokens)
    for sequence in sorted(sequences, key=len, reverse=True):
        if len(sequence) > max_tokens:
            raise ValueError(
                f"sequence {sequence.index} has {len(sequence)} tokens, more than max_tokens={max_tokens}; "
                "raise max_tokens or shorten episodes"
            )
        at = next((i for i, free in enumerate(room) if free >= len(sequence)), None)
        if at is None:
            rows.append([sequence])
            room.append(capacity - len(sequence))
        else:
            rows[at].append(sequence)
            room[at] -= len(sequence)
    batches: list[list[list[TrainSequence]]] = []
    for row in sorted(rows, key=_tokens, reverse=True):
        if batches and (len(batches[-1]) + 1) * _tokens(batches[-1][0]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [_micro_batch(batch, pad_id) for batch in batches]


def unpack(batch: MicroBatch, values: torch.Tensor) -> dict[int, np.ndarray]:
    """By sequence index, the values of each sequence in token order.

    ``values`` is (rows, row_length), giving one entry per token, or flat as ``batch.own`` gives it: one per own token.
    """
    flat = values.dim() == 1
    ids = (batch.own(batch.sequence_ids) if flat else batch.sequence_ids).cpu().numpy()
    array = values.detach().cpu().numpy()
    return {int(index): array[ids == index] for index in np.unique(ids) if index >= 0}


def empty_like(batch: MicroBatch) -> MicroBatch:
    """One row without any target: it gives the model zero gradients, so that every rank runs as many micro-batches."""
    corner = {field.name: getattr(batch, field.name)[:1, :2].clone() for field in fields(batch)}
    for name in ("advantages", "behaviour_logprobs", "weights"):
        corner[name].zero_()
    corner["targets"].fill_(IGNORED)
    corner["policy_mask"].fill_(False)
    corner["sequence_ids"].fill_(-1)
    return MicroBatch(**corner)


def _tokens(row: list[TrainSequence]) -> int:
    return sum(map(len, row))


def _on_own(own: np.ndarray, values: np.ndarray) -> np.ndarray:
    if len(values) != own.sum():
        raise ValueError(f"{len(values)} values for {own.sum()} own tokens; give one for each token the policy wrote")
    full = np.zeros(len(own))
    full[own] = values
    return full


def _micro_batch(rows: list[list[TrainSequence]], pad_id: int) -> MicroBatch:
    shape = (len(rows), _tokens(rows[0]))  # the longest row comes first
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "targets": np.full(shape, IGNORED, dtype=np.int64),
        "policy_mask": np.zeros(shape, dtype=bool),
        "sequence_ids": np.full(shape, -1, dtype=np.int64),
        **{name: np.zeros(shape, dtype=np.float32) for name in ("advantages", "behaviour_logprobs", "weights")},
    }
    for number, row in enumerate(rows):
        start = 0
        for sequence in row:
            end = start + len(sequence)
            here, predicts = (number, slice(start, end)), (number, slice(start, end - 1))
            arrays["input_ids"][here] = sequence.token_ids
            arrays["position_ids"][number, start:] = np.arange(shape[1] - start)
            arrays["sequence_ids"][here] = sequence.index
            arrays["targets"][predicts] = sequence.token_ids[1:]
            arrays["policy_mask"][predicts] = sequence.own_mask[1:]
            for name in ("advantages", "behaviour_logprobs", "weights"):
                arrays[name][predicts] = getattr(sequence, name)[1:]
            start = end
    return MicroBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})
