"""Numbers with units, as people write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_POWER = r"(?:\s*(?:×|\\times|\*|x)\s*10\s*\^?\s*\{?(?P<power>[-+−]?\d{1,3})\}?|[eE](?P<exponent>[-+]?\d{1,3}))?"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+−]?)\s*(?P<currency>\\?\$|€|£|¥)?\s*(?P<sign2>[-+−]?)\s*(?:(?P<whole>\d[\d,]*)\s+(?=\d+\s*/\s*\d))?"
    rf"(?P<number>{_DIGITS}){_POWER}(?:\s*/\s*(?P<divisor>{_DIGITS}))?\s*(?P<unit>[^\d\s].*)?"
)
# With a space before it, so that whole numbers stay apart from the fraction that they are mixed with.
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}(?!\s*[\d.])")
_DASH = re.compile(r"^[–—‒](?=\s*[\d.])")
_GROUPED = re.compile(r"(?<=\d)(?:\\[,;:!]|\{,\}|[\u2009\u202f\u00a0])(?=\d{3}(?!\d))")
_SPACE = re.compile(r"\\[,;:! ]|[~\u2009\u202f\u00a0]")
_TEXT = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}")
_SCALE = re.compile(r"(?i)(thousand|million|billion|trillion)s?\b\s*(?:of\b)?")
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
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
    scale: float = field(default=1.0, repr=False)
    """1e6 where the text says "million": then `value` counts millions."""

    def equals(self, other: Quantity, tolerance: Tolerance) -> bool:
        """Whether both mean the same; a unit, or "million", that only one of them has is taken for understood."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        pairs = [(self.value * self.scale, other.value * other.scale)]
        if 1.0 in (self.scale, other.scale):
            pairs.append((self.value, other.value))
        return any(math.isclose(*pair, rel_tol=tolerance.relative, abs_tol=tolerance.absolute) for pair in pairs)


def parse_quantity(text: str) -> Quantity | None:
    r"""Read a number with an optional unit; None where the text is something else.

    >>> parse_quantity("1,250.5 cm"), parse_quantity(r"\frac{3}{4}"), parse_quantity("$5")
    (Quantity(value=1250.5, unit='cm'), Quantity(value=0.75, unit=''), Quantity(value=5.0, unit='$'))
    >>> parse_quantity(r"12\frac{1}{2}"), parse_quantity("1.2 million").scale, parse_quantity("2x + 1")
    (Quantity(value=12.5, unit=''), 1000000.0, None)
    """
    text = _FRACTION.sub(r" \1/\2", _SPACE.sub(" ", _GROUPED.sub("", _DASH.sub("-", text.strip()))))
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or (found["whole"] and not (found["divisor"] and re.fullmatch(r"\d+", found["number"]))):
        return None
    unit_text = _TEXT.sub(r"\1", found["unit"] or "").strip()
    scaled = _SCALE.match(unit_text)
    unit = _unit(unit_text[scaled.end() :] if scaled else unit_text)
    if unit is None:
        return None
    power = (found["power"] or found["exponent"] or "0").replace("−", "-")
    value = float(f"{found['number'].replace(',', '')}e{power}")  # infinite where it is too large
    if found["divisor"]:
        divisor = _number(found["divisor"])
        if divisor == 0:
            return None
        value = value / divisor + _number(found["whole"] or "0")
    negative = (found["sign"] in ("-", "−")) != (found["sign2"] in ("-", "−"))
    currency = (found["currency"] or "").lstrip("\\")
    if not math.isfinite(value) or (currency and unit not in ("", currency)):
        return None
    scale = _SCALES[scaled[1].lower()] if scaled else 1.0
    return Quantity(-value if negative else value, currency or unit, scale)


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
