"""Nested settings by their whole names: ``budget.samples``."""

from __future__ import annotations

from typing import Any


def dotted(value: Any, prefix: str = "", *, into: type | tuple[type, ...] = dict) -> dict[str, Any]:
    """The leaves of nested containers by name; those that are not ``into``, and empty ones with a name, are leaves."""
    if not isinstance(value, into) or (prefix and not value):
        return {prefix: value}
    whole: Any = value  # mypy cannot know that it is a container
    items = whole.items() if isinstance(whole, dict) else enumerate(whole)
    return {k: v for name, part in items for k, v in dotted(part, f"{prefix}.{name}".strip("."), into=into).items()}
