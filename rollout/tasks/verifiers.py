"""Is this answer right? Functions of (answer, gold) -> bool; a dotted name of any such function is a verifier too."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from rollout.tasks.math_process import equal

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus after a digit, a letter or a bracket subtracts; a currency sign may stand on either side of the sign.
NUMBER = re.compile(rf"(?P<sign>(?<![\w).])-\s?)?\$?(?P<inner>-)?(?P<value>{DIGITS})(?:/(?P<below>[0-9]+))?")
PLAIN = re.compile(r"-?[0-9]{1,50}(\.[0-9]{1,50})?")
MAX_DIGITS = 100
MAX_CHARS = 4000  # of an answer that math-verify reads: its end, where the result stands
WRAPPED = ("$", r"\boxed", r"\(", r"\[")


def exact(answer: str, gold: Any) -> bool:
    """The same text, spaces around it aside."""
    return answer.strip() == str(gold).strip()


def final_number(answer: str, gold: Any) -> bool:
    """The last number of the answer equals the last of the gold text: ``$1,000`` is 1000.0 is ``1000 eggs``.

    Where the answer is LaTeX, or a number cannot be found, math-verify decides.
    """
    wanted, found = last_number(str(gold)), last_number(answer)
    if "\\" in answer or wanted is None or found is None:
        return math(answer, gold)
    return wanted == found


def math(answer: str, gold: Any) -> bool:
    """Equal as mathematics (math-verify). Blocks, on odd input for seconds: run it in a thread.

    WaitTimeout where no verdict came, UserError where the gold answer is no mathematics.
    """
    wanted = str(gold)
    if PLAIN.fullmatch(wanted.strip()) and PLAIN.fullmatch(answer.strip()):
        return last_number(wanted) == last_number(answer)
    return equal(as_latex(answer[-MAX_CHARS:]), as_latex(wanted))


def last_number(text: str) -> Fraction | None:
    """The last number in a text as an exact rational; None if there is none, or one beyond ``MAX_DIGITS`` digits."""
    matches = list(NUMBER.finditer(text))
    if not matches or len(matches[-1].group()) > MAX_DIGITS:
        return None
    match = matches[-1]
    value = Fraction(match["value"].replace(",", ""))
    if match["below"] and int(match["below"]):
        value /= int(match["below"])
    return -value if match["sign"] or match["inner"] else value


def as_latex(text: str) -> str:
    """Bare LaTeX in a box: math-verify reads LaTeX only inside a math environment."""
    text = text.strip()
    return rf"\boxed{{{text}}}" if "\\" in text and not any(mark in text for mark in WRAPPED) else text
