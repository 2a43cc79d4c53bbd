"""Recorded traces as workloads: coding sessions with their tools' and people's gaps, or requests without sessions."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from rollout.errors import UserError
from rollout.scheduling.workloads import Session, Turn, Workload, arrive, check_load

MOONCAKE_BLOCK = 512  # tokens behind one of its hash ids


def read_trace(
    path: Path,
    *,
    programs: int,
    rate: float | None = None,
    concurrency: int | None = None,
    seed: int = 0,
    tokens: float = 1.0,
    longest_gap: float = 600.0,
) -> Workload:
    """A workload of ``programs`` recorded sessions, drawn by seed (again from the start where there are fewer).

    Two kinds of JSON lines are read, gzipped or not. Sessions: ``block_size`` and ``requests[]`` with ``in``, ``out``
    tokens, ``stop``, ``t`` s, ``gap`` s since the last response, ``hash_ranges`` (inclusive ranges of block ids). A
    turn that stopped for a tool is followed by that tool's gap, any other by a person's, both cut at ``longest_gap``
    seconds; where a prompt does not extend the last one (compaction, dropped thinking) the common prefix stays.
    Requests (Mooncake): ``timestamp`` ms, ``input_length``, ``output_length``, ``hash_ids``: turns of one, unnamed.

    Sessions arrive as Poisson at ``rate``, or ``concurrency`` at a time: their own arrivals are days apart. Requests
    keep their order and their relative times, stretched to ``rate``.

    Raises:
        UserError: no such file, or a line that is neither.
    """
    check_load(rate, concurrency)
    if not path.is_file():
        raise UserError(f"trace: {path}: no such file; give trace=FILE with one JSON object a line")
    opener = gzip.compress(b"")[:2]
    raw = path.read_bytes()
    text = gzip.decompress(raw) if raw[:2] == opener else raw
    records = []
    for number, line in enumerate(io.TextIOWrapper(io.BytesIO(text), "utf-8", errors="replace"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append((_request(record, tokens), record["timestamp"] / 1e3) if "hash_ids" in record else
                           (_session(record, tokens, longest_gap), None))  # fmt: skip
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"trace: {path}, line {number}: neither a session nor a request ({type(error).__name__}: {error}); "
                "see the docstring of rollout.scheduling.traces.read_trace for what is read"
            ) from None
    if not records:
        raise UserError(f"trace: {path}: no line; give a file with one JSON object a line")
    rng = np.random.default_rng([seed, 3])
    if records[0][1] is not None:
        chosen = records[:programs]
        sessions = [session for session, _ in chosen]
        if rate is not None:
            times = np.array([second or 0.0 for _, second in chosen])
            times = (times - times[0]) * (len(times) / rate) / max(times[-1] - times[0], 1e-9)
            sessions = [
                Session(s.turns, float(t), s.prefix, False, False) for s, t in zip(sessions, times, strict=True)
            ]
    else:
        rounds = -(-programs // len(records))
        order = np.concatenate([rng.permutation(len(records)) for _ in range(rounds)])[:programs]
        sessions = [records[i][0] for i in order]
        if rate is not None:
            sessions = arrive(sessions, rate, rng)
    return Workload(path.name, tuple(sessions), concurrency)


def _request(record: dict[str, Any], scale: float) -> Session:
    prefix, left = [], record["input_length"]
    for name in record["hash_ids"]:
        prefix.append((str(name), round(scale * min(MOONCAKE_BLOCK, left))))
        left -= prefix[-1][1]
    turn = Turn(max(1, round(scale * record["input_length"])), max(1, round(scale * record["output_length"])))
    return Session((turn,), None, tuple(prefix), named=False, says_last=False)


def _session(record: dict[str, Any], scale: float, longest_gap: float) -> Session:
    requests, size = record["requests"], record["block_size"]
    turns = []
    for i, now in enumerate(requests):
        keep, prompt = None, now["in"]
        if i:
            before = requests[i - 1]
            common = size * _common(before["hash_ranges"], now["hash_ranges"])
            # The last whole block may differ: it can hold tokens that only close a prompt.
            extends = common + size >= before["in"] // size * size
            if extends and now["in"] > before["in"] + before["out"]:
                prompt = now["in"] - before["in"] - before["out"]
            else:
                keep = min(before["in"] if extends else common, now["in"] - 1)
                prompt = now["in"] - keep
        gap, tool = 0.0, None
        if i + 1 < len(requests):
            after = requests[i + 1]
            gap = min(after["t"] - now["t"] if after["gap"] is None else after["gap"], longest_gap)
            tool = "tool" if now["stop"] == "tool_use" else None
        lengths = max(1, round(scale * prompt)), max(1, round(scale * now["out"]))
        turns.append(Turn(*lengths, gap, tool, None if keep is None else round(scale * keep)))
    return Session(tuple(turns), says_last=False)


def _common(before: list[list[int]], now: list[list[int]]) -> int:
    """Blocks of the longest common prefix of two lists of inclusive ranges of block ids."""
    blocks = 0
    for (a, b), (c, d) in zip(before, now, strict=False):
        if a != c:
            break
        blocks += min(b, d) - a + 1
        if b != d:
            break
    return blocks
