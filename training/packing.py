"""Ragged sequences to packed micro-batches and back. Targets and per-token arrays are shifted here, and only here."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rollout.episode import Sequence as EpisodeSequence

IGNORED = -100  # no target
PER_TOKEN = ("advantages", "behaviour_logprobs", "weights", "returns", "values")


@dataclass
class TrainSequence:
    """One sequence as training sees it; every array has length n, one entry per token.

    ``own_mask`` is True on the tokens that get a loss: those that the policy wrote, or a part of them. ``advantages``,
    ``behaviour_logprobs``, ``weights`` (of the aggregation), ``returns`` (targets of the value model) and ``values``
    (what it said at the rollout) are 0 on all others; the last two are None, for 0 everywhere, without a value model.
    ``versions`` is -1 on tokens that the policy did not write. ``index`` is unique in a call of ``pack``.
    """

    token_ids: np.ndarray
    own_mask: np.ndarray
    advantages: np.ndarray
    behaviour_logprobs: np.ndarray
    weights: np.ndarray
    index: int
    versions: np.ndarray
    returns: np.ndarray | None = None
    values: np.ndarray | None = None

    def __post_init__(self) -> None:
        arrays = {name: getattr(self, name) for name in ("own_mask", "versions", *PER_TOKEN)}
        lengths = {name: len(array) for name, array in arrays.items() if array is not None}
        if set(lengths.values()) != {len(self.token_ids)}:
            raise ValueError(
                f"sequence {self.index}: {len(self.token_ids)} token_ids but {lengths}; give one entry each"
            )
        if len(self.token_ids) == 0 or self.own_mask[0]:
            raise ValueError(f"sequence {self.index} must open with a token of its prompt: nothing predicts the first")

    @classmethod
    def of(
        cls,
        sequence: EpisodeSequence,
        index: int,
        advantages: np.ndarray,
        weights: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        returns: np.ndarray | None = None,
        values: np.ndarray | None = None,
    ) -> TrainSequence:
        """From a rollout's sequence; every array has one entry per *own* token of it, also where ``mask`` is False.

        ``mask`` (bool) chooses the own tokens that get a loss: the others become as tokens that the policy did not
        write, whatever the arrays hold for them. ``train_prompt_ids`` takes the place of the sampled prompt where it
        is given.
        """
        prompt = sequence.token_ids[: sequence.prompt_length]
        if sequence.train_prompt_ids is not None:
            prompt = sequence.train_prompt_ids
        rest = slice(sequence.prompt_length, None)
        own = np.array([False] * len(prompt) + sequence.own_mask[rest], dtype=bool)
        logprobs = [x for x, mine in zip(sequence.behaviour_logprobs, sequence.own_mask, strict=True) if mine]
        chosen = np.ones(own.sum(), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)

        def spread(array: np.ndarray) -> np.ndarray:
            return _on_own(own, array, chosen)

        return cls(
            token_ids=np.array(prompt + sequence.token_ids[rest], dtype=np.int64),
            own_mask=spread(chosen).astype(bool),
            advantages=spread(advantages),
            behaviour_logprobs=spread(np.array(logprobs, dtype=np.float64)),
            weights=spread(weights),
            index=index,
            versions=np.array([-1] * len(prompt) + sequence.versions[rest], dtype=np.int64),
            returns=None if returns is None else spread(returns),
            values=None if values is None else spread(values),
        )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class MicroBatch:
    """Packed rows; every tensor has shape (rows, row_length).

    Position i of a row holds token i of some sequence in ``input_ids`` and ``position_ids`` (0, 1, ... per sequence),
    and, in all other fields, what belongs to the token it predicts, i + 1 of the same sequence: ``targets`` (-100 at
    a sequence's last token and on padding), ``policy_mask`` (the policy wrote the target, and it gets a loss),
    ``advantages``, ``behaviour_logprobs``, ``weights``, ``returns``, ``values``. A value model's output at position i
    is thus V of the state before the target. ``sequence_ids`` is the sequence's ``index``, -1 on padding. Padding
    stands at the end of a row only and goes on counting positions, so that a row of one sequence needs no mask.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    policy_mask: torch.Tensor
    advantages: torch.Tensor
    behaviour_logprobs: torch.Tensor
    weights: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor
    sequence_ids: torch.Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """The entries of a (rows, row_length) tensor whose targets get a loss: flat, row by row."""
        return values[self.policy_mask]

    @property
    def shape(self) -> tuple[int, int]:
        rows, length = self.input_ids.shape
        return rows, length


def pack(
    sequences: Sequence[TrainSequence],
    *,
    max_tokens: int,
    row_tokens: int | None = None,
    pad_id: int,
    multiple: int = 1,
) -> list[MicroBatch]:
    """Pack into micro-batches of at most ``max_tokens`` positions, padding included; the same input packs the same way.

    Sequences go by first fit, longest first, into rows of at most ``row_tokens``; a longer one has a row to itself, so
    ``row_tokens=1`` packs nothing. Rows of like length share a micro-batch. Default: ``max_tokens``, one row a
    micro-batch, as variable-length attention wants it; under SDPA attention costs the square of the row.

    ``multiple``: as many as that many processes need, of about as many positions each: ``deal`` gives each as much.

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
    rows.sort(key=_tokens, reverse=True)
    most = -(-len(_batches(rows, max_tokens)) // multiple) * multiple
    # The least capacity that needs no more of them: then they are of one size, and none waits for another.
    least = bisect.bisect_left(range(max_tokens), True, key=lambda size: len(_batches(rows, size)) <= most)
    return [_micro_batch(batch, pad_id) for batch in _batches(rows, max_tokens if multiple == 1 else least)]


def deal(micro_batches: Sequence[MicroBatch], size: int) -> list[list[MicroBatch]]:
    """By process, its part: in turn, and filled up to one number with rows that have no target."""
    each = -(-len(micro_batches) // size)
    parts = [list(micro_batches[rank::size]) for rank in range(size)]
    return [[*part, *(empty_like(micro_batches[0]) for _ in range(each - len(part)))] for part in parts]


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
    for name in PER_TOKEN:
        corner[name].zero_()
    corner["targets"].fill_(IGNORED)
    corner["policy_mask"].fill_(False)
    corner["sequence_ids"].fill_(-1)
    return MicroBatch(**corner)


def _tokens(row: list[TrainSequence]) -> int:
    return sum(map(len, row))


def _batches(rows: list[list[TrainSequence]], max_tokens: int) -> list[list[list[TrainSequence]]]:
    """Rows, longest first, in as few micro-batches as hold them."""
    batches: list[list[list[TrainSequence]]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * _tokens(batches[-1][0]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _on_own(own: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    if not len(values) == len(chosen) == own.sum():
        given = len(values) if len(values) != own.sum() else len(chosen)
        raise ValueError(f"{given} values for {own.sum()} own tokens; give one for each token the policy wrote")
    full = np.zeros(len(own))
    full[np.flatnonzero(own)[chosen]] = np.asarray(values)[chosen]
    return full


def _micro_batch(rows: list[list[TrainSequence]], pad_id: int) -> MicroBatch:
    shape = (len(rows), _tokens(rows[0]))  # the longest row comes first
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "targets": np.full(shape, IGNORED, dtype=np.int64),
        "policy_mask": np.zeros(shape, dtype=bool),
        "sequence_ids": np.full(shape, -1, dtype=np.int64),
        **{name: np.zeros(shape, dtype=np.float32) for name in PER_TOKEN},
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
            for name in PER_TOKEN:
                if (array := getattr(sequence, name)) is not None:
                    arrays[name][predicts] = array[1:]
            start = end
    return MicroBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})
