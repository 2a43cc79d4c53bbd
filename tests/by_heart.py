"""Teaching a tiny model token rows by heart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def learn_by_heart(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[bool]]], *, learning_rate: float, loss: float
) -> None:
    """Until the loss of each row's own tokens is below ``loss``. On one thread: more only wait for each other."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row, _ in rows])
    own = torch.tensor([[*mask, *[False] * (width - len(mask))] for _, mask in rows])
    labels = ids.masked_fill(~own, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(300):
        reached = model(input_ids=ids, labels=labels).loss
        if reached.item() < loss:
            break
        optimizer.zero_grad()
        reached.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert reached.item() < 2.5 * loss, "the tiny model did not learn its lessons"
