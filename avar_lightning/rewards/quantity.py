"""Numbers with units, as people write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_POWER = r"(?:\s*(?:×|\\times|\*|x)\s*10\s*\^?\s*\{?(?P<power>[-+−]?\d{1,3})\}?|[eE](?P<exponent>[-+]?\d{1,3}))?"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+−]?)\s*(?P<currency>\\?\$|€|£|¥)?\s*(?P<sign2>[-+−]?)\s*(?P<number>{_DIGITS}){_POWER}"
    rf"(?:\s*/\s*(?P<divisor>{_DIGITS}))?\s*(?P<unit>[^\d\s].*)?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_NO_UNITS = {"or", "and", "to", "not", "is", "of", "wrong", "right", "maybe", "perhaps"}
_UNITS = {
    "degree": "°", "deg": "°", r"\circ": "°", "degree celsius": "°c", "celsius": "°c", "percent": "%", r"\%": "%",
    "dollar": "$", "usd": "$", "euro": "€", "eur": "€", "pound": "£", "meter": "m", "metre": "m", "centimeter": "cm",
    "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km", "kilometre": "km", "gram": "g",
    "kilogram": "kg", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "liter": "l", "litre": "l",
    "foot": "ft", "feet": "ft", "inch": "in", "inche": "in",
}  # fmt: skip


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be off: absolute, or relative to the right one."""

    absolute: float = 0.0
    relative: float = 1e-9


@dataclass(frozen=True)
class Quantity:
    """A number and its unit, "" without one."""

    value: float
    unit: str

    def equals(self, other: Quantity, tolerance: Tolerance) -> bool:
        """Whether both mean the same; a unit that only one of them has is taken for understood."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        return math.isclose(self.value, other.value, rel_tol=tolerance.relative, abs_tol=tolerance.absolute)


def parse_quantity(text: str) -> Quantity | None:
    r"""Read a number with an optional unit; None where the text is something else.

    >>> parse_quantity("1,250.5 cm"), parse_quantity(r"\frac{3}{4}"), parse_quantity("$5")
    (Quantity(value=1250.5, unit='cm'), Quantity(value=0.75, unit=''), Quantity(value=5.0, unit='$'))
    >>> parse_quantity("2x + 1") is None
    True
    """
    text = _FRACTION.sub(r"\1/\2", text.strip())
    found = _QUANTITY.fullmatch(text)
    if found is None:
        return None
    unit = _unit(found["unit"] or "")
    if unit is None:
        return None
    power = (found["power"] or found["exponent"] or "0").replace("−", "-")
    value = float(f"{found['number'].replace(',', '')}e{power}")  # infinite where it is too large
    if found["divisor"]:
        divisor = _number(found["divisor"])
        if divisor == 0:
            return None
        value /= divisor
    negative = (found["sign"] in ("-", "−")) != (found["sign2"] in ("-", "−"))
    currency = (found["currency"] or "").lstrip("\\")
    if not math.isfinite(value) or (currency and unit not in ("", currency)):
        return None
    return Quantity(-value if negative else value, currency or unit)


def parse_tolerance(value: Any) -> Tolerance:
    """A sample's tolerance: None, a number (absolute), or text like "0.5" or "1%" (relative).

    Raises:
        ValueError: It is nothing of these, or negative.

    >>> parse_tolerance("1%")
    Tolerance(absolute=0.0, relative=0.01)
    """
    if value is None:
        return Tolerance()
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"tolerance is {value!r}, expected a number of 0 or more, or a share like '1%'.")
    return Tolerance(relative=number / 100) if text.endswith("%") else Tolerance(absolute=number)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _unit(text: str) -> str | None:
    """The unit in one spelling; None where what follows the number is no unit."""
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^?\{?\\circ\}?", "°", text).replace("²", "^2").replace("³", "^3")
    text = " ".join(text.strip().rstrip(".").casefold().split())
    text = re.sub(r"\b(?:square|sq\.?) (\w+)$", r"\1^2", text)
    text = re.sub(r"\b(?:cubic) (\w+)$", r"\1^3", text)
    words = re.split(r"[ /]", text)
    if not re.fullmatch(r"[a-zµμω°%$€£¥\\ /·]{0,30}(?:\^\d)?", text) or re.match(r"[a-z]?\s*[-/^]", text):
        return None
    if len(words) > 3 or _NO_UNITS & set(words):
        return None
    word, power = re.fullmatch(r"(.*?)(\^\d)?", text).groups()  # type: ignore[union-attr]
    known = _UNITS.get(word) or (_UNITS.get(word[:-1], word[:-1]) if len(word) > 3 and word.endswith("s") else word)
    return known + (power or "")
