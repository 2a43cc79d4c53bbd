"""An exact calculator: rationals, no eval, bounded work, and an error value for anything that is not arithmetic."""

from __future__ import annotations

import re
from fractions import Fraction

from rollout.tools import ToolError, tool

MAX_CHARS = 300
MAX_DEPTH = 40  # of parentheses and signs
MAX_BITS = 512  # of a numerator or a denominator: 154 digits

NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
TOKEN = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<operator>\*\*|//|[-+*/%()]))")
SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-"})
ADDITIVE, MULTIPLICATIVE = ("+", "-"), ("*", "/", "//", "%")


@tool(timeout=None)
def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as (12+30)*2.
    """
    return number_text(evaluate(expression))


def evaluate(expression: str) -> Fraction:
    """The exact value. Whatever cannot be computed, or only with numbers beyond ``MAX_BITS`` bits, is a ToolError.

    ``1,000`` is a thousand; ``%`` is a percentage where no operand follows it (``15% * 60``), else the remainder.
    """
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression is longer than {MAX_CHARS} characters")
    return Parser(expression.translate(SIGNS).rstrip()).parse()


def number_text(value: Fraction) -> str:
    """Integers plain, terminating decimals as decimals, anything else as a/b."""
    if value.denominator == 1:
        return str(value.numerator)
    twos, rest = multiplicity(value.denominator, 2)
    fives, rest = multiplicity(rest, 5)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def multiplicity(number: int, factor: int) -> tuple[int, int]:
    """How often ``factor`` divides ``number``, and what is left."""
    count = 0
    while number % factor == 0:
        number //= factor
        count += 1
    return count, number


class Parser:
    """Recursive descent over the tokens of one expression, with Python's precedence."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        while position < len(text):
            match = TOKEN.match(text, position)
            if match is None:
                raise ToolError(f"cannot read {text[position:].strip()[:20]!r}")
            self.tokens.append(match.group(match.lastgroup or 0))
            position = match.end()
        self.position = 0
        self.depth = 0

    def parse(self) -> Fraction:
        value = self.sum()
        if self.peek():
            raise ToolError(f"unexpected {self.peek()!r}")
        return value

    def peek(self, ahead: int = 0) -> str:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ADDITIVE:
            value = apply(self.take(), value, self.product())
        return value

    def product(self) -> Fraction:
        value = self.sign()
        while self.peek() in MULTIPLICATIVE:
            value = apply(self.take(), value, self.sign())
        return value

    def sign(self) -> Fraction:
        if self.peek() not in ADDITIVE:
            return self.power()
        self.deepen()
        value = -self.sign() if self.take() == "-" else self.sign()
        self.depth -= 1
        return value

    def power(self) -> Fraction:
        value = self.atom()
        if self.peek() != "**":
            return value
        self.take()
        self.deepen()
        exponent = self.sign()
        self.depth -= 1
        return raise_to(value, exponent)

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            self.deepen()
            value = self.sum()
            self.depth -= 1
            if self.take() != ")":
                raise ToolError("a parenthesis is not closed")
        elif token and token[0] in "0123456789.":
            value = checked(Fraction(token.replace(",", "")))
        else:
            raise ToolError(f"a number is missing before {token!r}" if token else "a number is missing at the end")
        if self.peek() == "%" and not self.operand_follows():
            self.take()
            value = checked(value / 100)
        return value

    def operand_follows(self) -> bool:
        following = self.peek(1)
        return following == "(" or following[:1].isdigit() or following[:1] == "."

    def deepen(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ToolError(f"more than {MAX_DEPTH} nested parentheses or signs")


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator in ("/", "//", "%") and right == 0:
        raise ToolError("division by zero")
    if operator == "+":
        value = left + right
    elif operator == "-":
        value = left - right
    elif operator == "*":
        value = left * right
    elif operator == "/":
        value = left / right
    elif operator == "//":
        value = Fraction(left // right)
    else:
        value = left % right
    return checked(value)


def raise_to(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("an exponent must be an integer")
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1  # 0 for 1, -1 and 0
    if bits * abs(exponent.numerator) > MAX_BITS:
        raise ToolError("the number is too large")
    return checked(base**exponent.numerator if bits else base ** (exponent.numerator % 2 or 2 * bool(exponent)))


def checked(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
        raise ToolError("the number is too large")
    return value
