"""Programs inferred from prompts (``infer_programs``): a prompt that extends a finished request is its next turn. Pure.

A finished request leaves two marks: after its prompt (the next turn may render the answer otherwise: thinking stripped,
a tool call written again), and after its output less the last token (a stop token, whose KV is never computed). A mark
is the hash of its last full block, which stands for all tokens before, and the few tokens that follow it: without
these, everyone behind one system prompt would be one program.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

REACH = 1024  # blocks looked up from a prompt's end: a turn that adds more than these is taken for a new program
Mark = tuple[bytes, tuple[int, ...]]  # hash of the last full block, tokens behind it (fewer than a block)


class PrefixIndex:
    """Marks of finished requests, at most ``limit``, those not used for longest forgotten.

    ``block_size`` is the number of tokens that one hash covers. A request shorter than a block leaves no mark.
    """

    def __init__(self, block_size: int, limit: int = 65_536) -> None:
        self._size = block_size
        self._limit = limit
        self._marks: OrderedDict[Mark, str | None] = OrderedDict()  # None: shared by several programs, so no one's
        self._tails: dict[bytes, Counter[int]] = {}  # by hash: how many marks have a tail of this length
        self._of: dict[str, set[Mark]] = {}
        self._named = 0

    def __len__(self) -> int:
        return len(self._marks)

    def name(self) -> str:
        """A name for a program that nothing is known of: inferred-1, inferred-2, …"""
        self._named += 1
        return f"inferred-{self._named}"

    def finished(self, program: str, prompt: int, tokens: Sequence[int], block_hashes: Sequence[bytes]) -> None:
        """``tokens`` is the whole turn, of which the first ``prompt`` were its prompt; one hash for each full block."""
        for length in {prompt, max(prompt, len(tokens) - 1)}:
            blocks = min(length // self._size, len(block_hashes))
            if blocks:
                self._set((block_hashes[blocks - 1], tuple(tokens[blocks * self._size : length])), program)

    def find(self, tokens: Sequence[int], block_hashes: Sequence[bytes]) -> str | None:
        """The program whose mark is the longest that the prompt ``tokens`` goes beyond, or None.

        A prompt equal to one that finished is a sibling, not its next turn. If the longest mark is shared by several
        programs (siblings' prompt) the answer is None: a shorter one would say no more. O(1): at most ``REACH``
        look-ups of hashes, and at most ``block_size`` tails behind a hash that is known.
        """
        for blocks in range(len(block_hashes), max(len(block_hashes) - REACH, 0), -1):
            known = block_hashes[blocks - 1]
            start = blocks * self._size
            for tail in sorted(self._tails.get(known, ()), reverse=True):
                mark = (known, tuple(tokens[start : start + tail]))
                if start + tail < len(tokens) and mark in self._marks:
                    self._marks.move_to_end(mark)
                    return self._marks[mark]
        return None

    def forget(self, program: str) -> None:
        """Drop the program's marks; marks it shared stay no one's."""
        for mark in list(self._of.get(program, ())):
            self._drop(mark)

    def _set(self, mark: Mark, program: str) -> None:
        if mark not in self._marks:
            self._marks[mark] = program
            self._tails.setdefault(mark[0], Counter())[len(mark[1])] += 1
            self._of.setdefault(program, set()).add(mark)
        elif self._marks[mark] not in (None, program):
            self._disown(mark)
            self._marks[mark] = None
        self._marks.move_to_end(mark)
        if len(self._marks) > self._limit:
            self._drop(next(iter(self._marks)))

    def _drop(self, mark: Mark) -> None:
        self._disown(mark)
        del self._marks[mark]
        tails = self._tails[mark[0]]
        tails[len(mark[1])] -= 1
        if not tails[len(mark[1])]:
            del tails[len(mark[1])]
        if not tails:
            del self._tails[mark[0]]

    def _disown(self, mark: Mark) -> None:
        program = self._marks[mark]
        if program is not None:
            self._of[program].discard(mark)
            if not self._of[program]:
                del self._of[program]
