"""Errors that a person reads: one line that says what was wrong, where, and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Raised for what the user can mend. Commands print it on one line and exit with 2."""


class EngineDied(RuntimeError):
    """The engine can serve no more requests; what it last said stands in the message."""


class WaitTimeout(TimeoutError):
    """A wait ended without its event; the message names what was waited for and for how long."""
