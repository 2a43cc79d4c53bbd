from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.tools import ToolError
from rollout.tools.calculator import MAX_BITS, calculator, evaluate, number_text

JUNK = "0123456789.,+-*/%() eE_xj=<>'\"[]×÷−\n\t\x00٣"


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12+34", "46"),
        ("3-10", "-7"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("-2**2", "-4"),
        ("2**3**2", "512"),
        ("2**-2", "0.25"),
        ("--3", "3"),
        ("0.1+0.2", "0.3"),
        (".5*6.", "3"),
        ("1/3", "1/3"),
        ("-1/8", "-0.125"),
        ("2/4*2", "1"),
        ("1,000,000/4", "250000"),
        ("15%*60", "9"),
        ("60*15%", "9"),
        ("(20+30)%", "0.5"),
        ("50%-0.1", "0.4"),
        ("17 % 5", "2"),
        ("17%(5)", "2"),
        ("-7//2", "-4"),
        ("-7%4", "1"),
        ("2 × 3 − 8 ÷ 4", "4"),
        (" 7 ", "7"),
        ("(-1)**1001", "-1"),
        ("1**999999999", "1"),
        ("0**0", "1"),
        ("0**5", "0"),
        ("007", "7"),
    ],
)
def test_expressions(expression: str, result: str) -> None:
    assert calculator.function(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        *["", " ", "a", "1+", "(1", "1)", "()", "1 2", "1,00", "1,0000", "1..2", "1/0", "1%(0)", "1//0", "0**-1"],
        *["2**0.5", "9**9**9", "9**99999999999", "2=2", "1e5", "0x10", "1_000", "٣", "__import__('os')"],
        *["(" * 99 + "1" + ")" * 99, "-" * 99 + "1", "1+" * 200 + "1", "2**" * 60 + "1", "9" * 299],
    ],
)
def test_junk_is_an_error_value_at_once(expression: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ToolError) as error:
        calculator.function(expression)
    assert time.perf_counter() - start < 0.1
    assert "\n" not in str(error.value) and len(str(error.value)) < 100


@given(st.text(alphabet=JUNK, max_size=40) | st.text(max_size=40))
def test_any_text_is_a_short_result_or_an_error_value(text: str) -> None:
    try:
        result = calculator.function(text)
    except ToolError:
        return
    assert len(result) <= MAX_BITS + 10
    assert evaluate(result) == evaluate(text)


numbers = st.integers(0, 999) | st.decimals(0, 999, places=2)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, Fraction]:
    """An expression in brackets, and its value by ``fractions`` alone."""
    if depth == 0 or draw(st.booleans()):
        number = draw(numbers)
        return f"{number}", Fraction(number)
    (left, a), (right, b) = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    operators = ["+", "-", "*"] + (["/", "//", "%"] if b else [])
    op = draw(st.sampled_from(operators))
    value = {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "/": lambda: a / b,
        "//": lambda: Fraction(math.floor(a / b)),
        "%": lambda: a - b * math.floor(a / b),
    }[op]()
    return f"({left}){op}({right})", value


@given(expressions())
def test_agrees_with_fractions(case: tuple[str, Fraction]) -> None:
    text, value = case
    assert evaluate(text) == value


@given(st.lists(st.tuples(st.sampled_from(["+", "-", "*"]), st.integers(0, 99)), min_size=1, max_size=8))
def test_precedence_is_pythons(parts: list[tuple[str, int]]) -> None:
    text = "1" + "".join(f"{op}{number}" for op, number in parts)
    assert evaluate(text) == eval(text)


@given(st.fractions(max_denominator=10**6))
def test_texts_of_numbers_are_exact_and_shortest(value: Fraction) -> None:
    text = number_text(value)
    assert Fraction(text) == value
    assert not ("." in text and text.endswith("0"))
