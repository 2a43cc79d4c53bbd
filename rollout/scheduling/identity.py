"""Whose request this is, what its output called, and how it ended: read from vLLM's requests."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rollout.scheduling.prefixes import PrefixIndex
from rollout.scheduling.programs import LONGEST_NAME
from rollout.scheduling.tool_names import ToolNames, Undecodable, decode, label

if TYPE_CHECKING:
    from vllm.v1.request import Request

log = logging.getLogger(__name__)
UNKNOWN = "unknown"  # the engine has no tokenizer, or it raised: whether a tool was called is for the client to say
INFERRED = "inferred-"  # how the names begin that are given to programs that have none
STOP_TAIL = 64  # output tokens in which a stop string is looked for


class Identity:
    """``infer``: requests without a name belong to the program whose finished request they extend."""

    def __init__(self, structured_output_manager: Any, hash_block_size: int, *, infer: bool) -> None:
        there = hasattr(structured_output_manager, "tokenizer")  # not with skip_tokenizer_init
        self._tokenizer = structured_output_manager.tokenizer if there else None
        self._names = ToolNames(self._tokenizer) if self._tokenizer is not None else None
        self._prefixes = PrefixIndex(hash_block_size) if infer else None
        self._told = False

    def program(self, request: Request) -> str | None:
        """vLLM's ``session_id``, or ``extra_args["session_id"]``; else by its prefix; None for a request on its own."""
        for name in (request.session_id, _extra(request, "session_id")):
            if isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable() and not self._taken(name):
                return name
        return self._prefixes.find(request.all_token_ids, request.block_hashes) if self._prefixes is not None else None

    def tool_before(self, request: Request) -> str | None:
        """The tool whose result opens this turn, if the client says so."""
        tool = _extra(request, "tool")
        return label(tool) if isinstance(tool, str) and tool else None

    def last_turn(self, request: Request) -> bool:
        """Whether the client says that no turn follows."""
        return _extra(request, "last_turn") in (True, 1, "1", "true")

    def tool_after(self, request: Request) -> str | None:
        """The tool that the output calls; None: it answers, and a person is next."""
        if self._names is None:
            return UNKNOWN
        try:
            return self._names.call(request.output_token_ids)
        except Undecodable as error:
            self._tell(f"the tokenizer cannot read an output ({error})")
            return UNKNOWN

    def stopped_by_string(self, request: Request) -> bool:
        """A stop string ends a request in the front end, which aborts it here then, as for a client that left."""
        stops = (request.sampling_params.stop or []) if request.sampling_params is not None else []
        stops = [stops] if isinstance(stops, str) else stops
        if not stops or self._tokenizer is None:
            return False
        try:
            text = decode(self._tokenizer, request.output_token_ids[-STOP_TAIL:])
        except Undecodable as error:
            self._tell(f"the tokenizer cannot read an output ({error})")
            return False
        return any(stop in text for stop in stops)

    def finished(self, request: Request, name: str | None) -> str | None:
        """Remember where a finished request ended, so that the next one is known by its prefix.

        Returns the name of its program: a new one if it had none, None if programs are not inferred.
        """
        if self._prefixes is None:
            return name
        name = name or self._prefixes.name()
        self._prefixes.finished(name, request.num_prompt_tokens, request.all_token_ids, request.block_hashes)
        return name

    def goes_on_unsaid(self) -> None:
        """A program goes on, and its client does not say after which tool: then it is for the tokenizer to know."""
        if self._names is None:
            self._tell("the engine has no tokenizer")

    def _tell(self, cause: str) -> None:
        """Once: it will be so again and again."""
        if not self._told:
            log.warning("%s: what a turn calls, and that a job is over, is for clients to say (tool, last_turn)", cause)
            self._told = True

    def _taken(self, name: str) -> bool:
        return self._prefixes is not None and name.startswith(INFERRED)

    def forget(self, name: str) -> None:
        if self._prefixes is not None:
            self._prefixes.forget(name)


def _extra(request: Request, key: str) -> Any:
    arguments = request.sampling_params.extra_args if request.sampling_params is not None else None
    return (arguments or {}).get(key)
