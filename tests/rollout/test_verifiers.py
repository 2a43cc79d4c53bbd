from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import UserError, WaitTimeout
from rollout.tasks.math_process import WORKER, MathProcess, equal
from rollout.tasks.verifiers import exact, final_number, last_number, math


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1000", "1,000"),
        ("$1,000", "1000"),
        ("1000.0", "1,000"),
        ("1,000.00 dollars", "1000"),
        ("The total is 7 + 11 = 18.", "18"),
        ("#### 18", "18"),
        ("-5", "-5"),
        ("$-5", "-$5"),
        ("12-5 = 7", "7"),
        ("0.5", "1/2"),
        ("50%", "50"),
        (r"\boxed{18}", "18"),
        (r"\frac{1}{2}", "0.5"),
        (r"The answer is $\frac{36}{2}$.", "18"),
    ],
)
def test_the_final_number_decides(answer: str, gold: str) -> None:
    assert final_number(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("", "18"), ("none", "18"), ("18 of 20", "18"), ("5", "-5"), ("1,0001", "1000"), ("9" * 500, "9"), ("\\", "1")],
)
def test_other_final_numbers_do_not(answer: str, gold: str) -> None:
    assert not final_number(answer, gold)


@given(st.text(alphabet="0123456789.,-/$ a=()", max_size=30) | st.text(max_size=30))
def test_any_text_has_a_last_number_or_none(text: str) -> None:
    value = last_number(text)
    assert value is None or isinstance(value, Fraction)


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{:,}", "{}", "x = {}", "${:,}.00 ", "{} eggs.", "7 or rather {:,}"])
)
def test_a_number_is_found_in_any_dress(number: int, dress: str) -> None:
    assert last_number(dress.format(number)) == number


def test_free_form_answers() -> None:
    assert math(r"\boxed{x^2+2x+1}", "$(x+1)^2$")
    assert math("0.75", r"\frac{3}{4}")
    assert not math("0.7", r"\frac{3}{4}")
    assert math("0.50", 0.5) and not math("0.5", "5")
    assert exact(" Paris\n", "Paris") and not exact("paris", "Paris")


def test_a_gold_answer_without_mathematics_is_named() -> None:
    with pytest.raises(UserError, match="cannot read the gold answer '!'; use exact"):
        math("x", "!")


def test_an_answer_that_cannot_be_computed_ends_in_time_and_harms_nobody() -> None:
    assert equal("2", "2")
    start = time.monotonic()
    with pytest.raises(WaitTimeout, match=r"math-verify has no verdict on .* after 1 s"):
        equal(r"\boxed{10^{10000000000}}", "18", timeout=1)
    assert time.monotonic() - start < 10
    assert equal("2", "2")


def test_processes_serve_threads_side_by_side() -> None:
    with ThreadPoolExecutor(16) as threads:
        verdicts = list(threads.map(lambda i: math(rf"\boxed{{\frac{{{2 * i}}}{{2}}}}", str(i)), range(1, 40)))
    assert all(verdicts)


def test_a_process_that_dies_says_so() -> None:
    process = MathProcess()
    process.process.kill()
    process.process.wait()
    with pytest.raises((WaitTimeout, BrokenPipeError)):
        process.equal("1", "1", 5)


def test_the_worker_ends_when_nobody_writes_to_it_any_more() -> None:
    lines = json.dumps(["$1$", "$1.0$"]) + "\n"
    done = subprocess.run([sys.executable, "-P", str(WORKER)], input=lines, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ready\ntrue\n" and done.returncode == 0
