"""Answers that are no option: where a response says them, and whether two of them are the same."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from avar_lightning.benchmarks.answers import conclusion, named, stated
from avar_lightning.rewards import accuracy_reward
from avar_lightning.rewards.quantity import parse_quantity

MAX_VALUE = 1000  # characters of a text that may be a number or a list
MAX_BARE = 40  # characters of a response that is nothing but its answer
_NUMBER = re.compile(r"(?<![\w.,])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?![\w]|[.,]\d)")
_LIST = re.compile(r"\[[^\[\]]*\]")


def find_value(response: str) -> str | None:
    r"""What a response names as its value; None where rules find nothing.

    In this order: what is tagged or boxed; what follows the last "the answer is" or "Answer:" up to the end of its
    sentence; a number that ends the response behind "is" or "="; the whole of a response of one short line.

    >>> find_value(r"So \boxed{5}."), find_value("The answer is 1.5 cm. It was long."), find_value("Thus x is 7.")
    ('5', '1.5 cm', '7')
    """
    short = stated(response)
    if short is not None:
        return short
    text = conclusion(response)
    value = named(text)
    if value is not None:
        return value or None
    last = text.rsplit("\n", 1)[-1]
    for word in ("is ", "= ", "="):
        tail = last.rpartition(word)[2].strip().rstrip(".")
        if tail != last and parse_quantity(tail.strip("*$ ")) is not None:
            return tail.strip("*$ ")
    bare = text.rstrip(".")
    return bare if bare and len(bare) <= MAX_BARE and "\n" not in bare and len(bare.split()) <= 5 else None


def number_in(text: str) -> str | None:
    r"""The one number that a short text gives, without unit and thousands separators; None for none or several.

    >>> number_in("12,000 people"), number_in("x = -3.0"), number_in(r"\frac{3}{4}"), number_in("3 or 4")
    ('12000', '-3', '0.75', None)
    """
    text = text.strip().strip("*$` ").rstrip(".")
    if len(text) > MAX_VALUE:
        return None
    for piece in dict.fromkeys((text, text.rpartition("=")[2].strip(), text.rpartition("≈")[2].strip())):
        quantity = parse_quantity(piece.removeprefix(r"\(").removesuffix(r"\)").strip())
        if quantity is not None:
            return _written(quantity.value)
    found = {_written(quantity.value) for item in _NUMBER.findall(text) if (quantity := parse_quantity(item))}
    return found.pop() if len(found) == 1 else None


def list_in(text: str) -> str | None:
    """The last list in a text, written as Python does; a text of nothing but numbers and commas is one.

    >>> list_in("They are [0,2, 4]."), list_in("0, 2 and 4"), list_in("none")
    ('[0, 2, 4]', '[0, 2, 4]', None)
    """
    if len(text) > MAX_VALUE:
        return None
    found = _LIST.findall(text)
    if not found:
        items = [item for item in re.split(r"\s*(?:,|\band\b)\s*", text.strip().strip("()").rstrip(".")) if item]
        if len(items) < 2 or not all(parse_quantity(item) for item in items):
            return None
        found = [f"[{', '.join(items)}]"]
    value = parse_list(found[-1])
    return None if value is None else str(value)


def parse_list(text: str) -> list[Any] | None:
    """A list in Python's notation; None for anything else."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, list) else None


def same_number(given: str, right: str, decimals: int) -> bool:
    """Whether two numbers agree when both are rounded."""
    try:
        ours, theirs = float(given), float(right)
    except ValueError:
        return False
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return False
    return math.isclose(round(ours, decimals), round(theirs, decimals), abs_tol=1e-9)


def same_value(given: str, right: str, *, decimals: int | None = None) -> bool:
    """Whether two answers are the same text, number with unit, list or mathematical expression.

    Args:
        given: An extracted answer; of an equation its right side counts too.
        right: The right one.
        decimals: Numbers are compared when rounded to so many; default: up to rounding errors.

    >>> same_value("x = 0.5", r"\\frac{1}{2}"), same_value("3.14", "3.1416", decimals=2), same_value("3.14", "3.1416")
    (True, True, False)
    """
    forms = list(dict.fromkeys((given, given.rpartition("=")[2].strip())))
    tags = [f"<answer>{form}</answer>" for form in forms if form]
    if any(accuracy_reward(tags, [right] * len(tags))):
        return True
    if decimals is None:
        return False
    ours, theirs = number_in(given), number_in(right)
    return ours is not None and theirs is not None and same_number(ours, theirs, decimals)


def _written(value: float) -> str:
    return format(value, ".15g")
