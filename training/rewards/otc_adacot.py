"""OTC and AdaCoT at once: economy multiplies correctness, the prices of thinking are taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.episode import Episode
from training.rewards.adacot import AdaCot
from training.rewards.otc import Otc


class OtcAdaCot:
    """The parts of both; ill form costs success its economy, and its price besides."""

    needs_tools = True
    teaches_solved = True

    def __init__(self, otc: Otc, adacot: AdaCot) -> None:
        self.otc, self.adacot = otc, adacot
        self.scales, self.joined = adacot.scales, otc.joined
        self.mask_decision = adacot.mask_decision

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        """The environment's parts, ``tools`` of the one, ``missed``, ``over`` and ``format`` of the other."""
        return [tools | thinking for tools, thinking in zip(self.otc(group), self.adacot(group), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"otc": self.otc.state_dict(), "adacot": self.adacot.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.otc.load_state_dict(state["otc"])
        self.adacot.load_state_dict(state["adacot"])
