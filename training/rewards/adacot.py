"""AdaCoT: when to think is the policy's decision, and has a price (arXiv 2505.11896). Pure terms, and the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollout.episode import Episode
from training.success_history import SuccessHistory

PRICES = ("missed", "over", "format")  # parts of the reward, in the order of ``penalties``


def shaped_reward(
    base: Any,
    *,
    thought: Any,
    needs_thought: Any,
    well_formed: Any,
    alpha_miss: float,
    alpha_over: float,
    gamma_format: float,
) -> Any:
    """R = base - alpha_miss P_miss - alpha_over P_over - gamma_format P_fmt, all three P binary (§2.2.2, eq. 4).

    P_miss: it needed thought and got none. P_over: it needed none and got some. P_fmt: ill-formed.

    Args:
        base: one reward, or (n,).
        thought, well_formed: booleans, one each.
        needs_thought: one boolean or None each, or a single None; None has neither P_miss nor P_over.

    Returns:
        A float for one reward; else a tensor (n,), float64 unless ``base`` has another floating dtype.

    Raises:
        ValueError: empty, unequal lengths, not finite, or a negative coefficient.
    """
    for name, factor in (("alpha_miss", alpha_miss), ("alpha_over", alpha_over), ("gamma_format", gamma_format)):
        if not (np.isfinite(factor) and factor >= 0):
            raise ValueError(f"{name}={factor} must be a finite number of at least 0")
    given = base if isinstance(base, torch.Tensor) else torch.as_tensor(np.asarray(base))
    rewards = given.double().reshape(-1)
    n = len(rewards)
    if n == 0 or given.ndim > 1 or not bool(rewards.isfinite().all()):
        raise ValueError(f"base={base} must be finite rewards, at least one: mend the reward function")
    needs = [None] * n if needs_thought is None else _each("needs_thought", needs_thought, n)
    terms = zip(_each("thought", thought, n), needs, _each("well_formed", well_formed, n), strict=True)
    parts = [penalties(did, need, kept) for did, need, kept in terms]
    factors = torch.tensor([alpha_miss, alpha_over, gamma_format], dtype=torch.float64)
    result = rewards - torch.tensor(parts, dtype=torch.float64) @ factors
    if not given.ndim:
        return float(result)
    return result.to(given.dtype) if given.dtype.is_floating_point else result


def penalties(thought: bool, needs_thought: bool | None, well_formed: bool) -> tuple[float, float, float]:
    """P_miss, P_over and P_fmt of one decision."""
    missed = needs_thought is not None and bool(needs_thought) and not thought
    over = needs_thought is not None and not needs_thought and bool(thought)
    return float(missed), float(over), float(not well_formed)


def _each(name: str, given: Any, n: int) -> list[Any]:
    values = list(given) if np.ndim(given) else [given]
    if len(values) != n:
        raise ValueError(f"{len(values)} entries of {name} for {n} rewards; give one each")
    return values


def decision_mask(token_ids: Any, think_token_id: int, *, own: Any = None) -> torch.Tensor:
    """Selective Loss Masking (§2.2.3): False at the first own token after each ``<think>``, the decision to think.

    Args:
        token_ids: (n,) of a sequence.
        own: (n,) booleans, True where the policy wrote the token; None: everywhere. A ``<think>`` may stand in the
            prompt: the decision is the first token that the policy writes after it. A trailing one masks nothing.

    Returns:
        Boolean tensor (n,).

    Raises:
        ValueError: empty, or unequal lengths.
    """
    ids = [int(token) for token in token_ids]
    mine = [True] * len(ids) if own is None else [bool(flag) for flag in own]
    if not ids or len(ids) != len(mine):
        raise ValueError(f"{len(ids)} token_ids and {len(mine)} entries of own must be of one length, at least 1")
    mask, decides = torch.ones(len(ids), dtype=torch.bool), False
    for at, (token, written) in enumerate(zip(ids, mine, strict=True)):
        if decides and written:
            mask[at] = decides = False
        decides = decides or token == think_token_id
    return mask


class AdaCot:
    """The environment's reward less the price of a missed thought, of a needless one, and of ill form.

    ``labels`` task: what the row says of a turn's need (``needs_thought``). self: a prompt needs thought if the policy
    answered it right without any in fewer than ``threshold`` of its last ``least_seen`` such rollouts; one with fewer
    has neither price. A rollout whose mode the template forced pays for neither: it had no choice. Nor does one whose
    system prompt asks for a mode: it pays ``alpha_told`` for the other one, which above 1 is more than a right answer
    is worth. An answer longer than ``longest_answer`` characters counts as thought: reasoning may not move there for
    free. ``mask_decision`` drops the policy loss of the decision itself, for stages that would push it one way.
    """

    needs_tools = False
    teaches_solved = True

    def __init__(
        self,
        alpha_miss: float = 0.2,
        alpha_over: float = 0.3,
        gamma_format: float = 1.0,
        alpha_told: float = 1.5,
        labels: str = "task",
        threshold: float = 0.5,
        least_seen: int = 4,
        longest_answer: int | None = None,
        mask_decision: bool = False,
    ) -> None:
        self.scales = dict(zip(PRICES, (alpha_miss, alpha_over, gamma_format), strict=True)) | {"told": alpha_told}
        self.learns_labels, self.threshold, self.least_seen = labels == "self", threshold, least_seen
        self.longest_answer = longest_answer
        self.mask_decision = mask_decision
        self.direct = SuccessHistory()  # of rollouts without thought

    def __call__(self, group: Sequence[Episode]) -> list[dict[str, float]]:
        """The environment's parts, and ``missed``, ``over`` and ``format``, each 0 or minus its price; where the system
        prompt asks for a mode also ``told``.
        """
        if self.learns_labels:
            self.direct.add([e for e in group if not e.thought])
            self.direct.now += 1
        return [{**episode.rewards, **self.parts(episode)} for episode in group]

    def parts(self, episode: Episode) -> dict[str, float]:
        """What is paid; each price once, however many turns owe it."""
        decisions = episode.decisions(self.need(episode), self.longest_answer) or [(False, None)]
        owed = [penalties(thought, needs, episode.well_formed) for thought, needs in decisions]
        columns = zip(PRICES, zip(*owed, strict=True), strict=True)
        paid = {name: -self.scales[name] * max(column) for name, column in columns}
        if episode.told is None:
            return paid
        ((thought, _),) = episode.decisions(None, self.longest_answer)
        return {**paid, "told": -self.scales["told"] * (thought != (episode.told == "always"))}

    def need(self, episode: Episode) -> bool | list[bool | None] | None:
        """Whether the prompt needs thought; None where that is unknown, or was not the policy's to decide."""
        if episode.reasoning in ("always", "never") or episode.told is not None:
            return None
        if not self.learns_labels:
            return episode.needs_thought
        rate = self.direct.last_rates([episode.prompt_id], self.least_seen)[0]
        return None if np.isnan(rate) else bool(rate < self.threshold)

    def state_dict(self) -> dict[str, Any]:
        return self.direct.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.direct.load_state_dict(state)
