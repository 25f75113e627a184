"""Answers that are no option: where a response says them, and whether two of them are the same."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from avar_lightning.benchmarks.answers import conclusion, named, stated, unmarked, without_adverbs
from avar_lightning.rewards import accuracy_reward
from avar_lightning.rewards.quantity import Quantity, parse_quantity

MAX_VALUE = 1000  # characters of a text that may be a number or a list
MAX_OPTION = 100  # characters of a value that is compared with every option
MAX_WORDS = 3  # of a value that is no sentence
MAX_BARE = 40  # characters of a response that is nothing but its answer
_NUMBER = re.compile(r"(?<![\w.,])[-−–+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?![\w]|[.,]\d)")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")
_LIST = re.compile(r"\[[^\[\]]*\]")


def find_value(response: str) -> str | None:
    r"""What a response names as its value; None where rules find nothing.

    In this order: what is tagged or boxed; what follows the last "the answer is" or "Answer:" up to the end of its
    sentence; a number that ends the response behind "is" or "="; the whole of a response of one short line.

    >>> find_value(r"So \boxed{5}."), find_value("The answer is 1.5 cm. It was long."), find_value("Thus x is 7.")
    ('5', '1.5 cm', '7')
    """
    tagged = stated(response)
    if tagged is not None:
        return without_adverbs(tagged)
    text = conclusion(response)
    value = named(text)
    if value is not None:
        return value
    last = unmarked(text).rsplit("\n", 1)[-1]
    for word in ("is ", "= ", "="):
        tail = without_adverbs(last.rpartition(word)[2].strip().rstrip("."))
        if tail != last and parse_quantity(tail) is not None:
            return tail
    bare = text.rstrip(".")
    short = len(bare) <= MAX_BARE and "\n" not in bare and len(bare.split()) <= 5
    return bare if bare and short and not re.search(r"(?i)\bnot\b|n't\b", bare) else None


def find_short_value(response: str) -> str | None:
    """What a response names as its value, where that is no sentence, which nothing would equal.

    >>> find_short_value("The answer is 5 cm."), find_short_value("So there are 5 dogs.")
    ('5 cm', None)
    """
    value = find_value(response)
    return value if value and len(re.findall(r"(?<!\\)\b[^\W\d_]{2,}", value)) <= MAX_WORDS else None


def find_list(response: str) -> str | None:
    """The list that a response tags or boxes, or else its last one, written as Python does.

    >>> find_list("From [1, 2] follows the final list: [0,2, 4]."), find_list("The answer is 0, 2 and 4.")
    ('[0, 2, 4]', '[0, 2, 4]')
    """
    tagged = stated(response)
    if tagged is not None:
        return list_in(tagged)
    text = conclusion(response)
    if _LIST.search(text):
        return list_in(_LIST.findall(text)[-1])
    value = find_value(response)
    return None if value is None else list_in(value)


def option_with_value(response: str, options: Mapping[str, str], *, decimals: int | None = None) -> str | None:
    r"""The one option whose text or value a response names; None for none or several.

    >>> option_with_value(r"So \boxed{0.5}", {"A": "$\\frac{1}{4}$", "B": "$\\frac{1}{2}$"})
    'B'
    """
    value = find_value(response)
    if value is None or len(value) > MAX_OPTION:
        return None
    same = [letter for letter, text in options.items() if value.casefold() == text.casefold()]
    if same or _LETTER.search(value):  # "(B) 12 N" says an option already, or two
        return same[0] if len(same) == 1 else None
    found = [letter for letter, text in options.items() if same_value(value, text, decimals=decimals)]
    return found[0] if len(found) == 1 else None


def number_in(text: str) -> str | None:
    r"""The one number that a short text gives, without unit and thousands separators; None for none or several.

    "%", "million" and the like stay: :func:`readings` gives what they may mean.

    >>> number_in("12,000 people"), number_in("x = -3.0"), number_in(r"\frac{3}{4}"), number_in("3 or 4")
    ('12000', '-3', '0.75', None)
    >>> number_in("25 %"), number_in("1.2 million people")
    ('25%', '1.2 million')
    """
    text = text.strip().strip("*$` ").rstrip(".").strip()
    if len(text) > MAX_VALUE or re.match(r"(?i)not\b", text):
        return None
    for piece in dict.fromkeys((text, text.rpartition("=")[2].strip(), text.rpartition("≈")[2].strip())):
        quantity = parse_quantity(piece.removeprefix(r"\(").removesuffix(r"\)").strip())
        if quantity is not None:
            return _written(quantity)
    found = {_written(quantity) for item in _NUMBER.findall(text) if (quantity := parse_quantity(item))}
    return found.pop() if len(found) == 1 else None


def readings(number: str) -> tuple[float, ...]:
    """What a number may mean: "25%" is 25 or 0.25, "1.2 million" is 1.2 or 1,200,000; nothing where it is none.

    >>> readings("25%"), readings("1.2 million"), readings("x")
    ((25.0, 0.25), (1.2, 1200000.0), ())
    """
    quantity = parse_quantity(number)
    if quantity is None:
        return ()
    factor = 0.01 if quantity.unit == "%" else quantity.scale
    return (quantity.value,) if factor == 1.0 else (quantity.value, quantity.value * factor)


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


def same_number(given: float, right: float, decimals: int) -> bool:
    """Whether two numbers agree when both are rounded."""
    return math.isclose(round(given, decimals), round(right, decimals), abs_tol=1e-9)


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
    if ours is None or theirs is None:
        return False
    return any(same_number(mine, other, decimals) for mine in readings(ours) for other in readings(theirs)[:1])


def _written(quantity: Quantity) -> str:
    words = {1e3: " thousand", 1e6: " million", 1e9: " billion", 1e12: " trillion"}
    return format(quantity.value, ".15g") + ("%" if quantity.unit == "%" else words.get(quantity.scale, ""))
