"""Right answers and well-formed completions, told by rules."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from avar_lightning.mathematics import same_expressions
from avar_lightning.rewards.quantity import Tolerance, parse_quantity, parse_tolerance

_PLAIN = r"(?:(?!</?think>|</?answer>).)*"
_FORMAT = re.compile(rf"\s*<think>{_PLAIN}</think>\s*<answer>{_PLAIN}</answer>\s*", re.DOTALL)
# A letter alone or before a text, with or without "answer", "option" and brackets.
_CHOICE = re.compile(
    r"(?:the\s+)?(?:correct\s+|right\s+)?(?:(?:answer|option|choice)\b\s*(?:is\b|:)?\s*)?"
    r"(?:option\s+)?(?:\(([a-z])\)|([a-z])(?=\s*(?:[.:),-]|$)))\s*[.:),-]?\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_LETTER = re.compile(r"\(?([A-Za-z])\)?\.?")
_ALONE = re.compile(r"(?:^|[\s(,;/])([A-H])(?=[\s).,:;/]|$)")
_MATHEMATICAL = re.compile(r"[\d\\^=+*/√π∞<>{}|]")
_WRAPPINGS = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("`", "`"), ('"', '"'))


def extract_answer(completion: str) -> str | None:
    r"""The text inside the last `<answer>…</answer>`, or else the last `\boxed{…}`; `None` where there is neither.

    >>> extract_answer("<think>2 + 2</think><answer> 4 </answer>")
    '4'
    >>> extract_answer("4") is None
    True
    """
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    return completion[start + len("<answer>") : end].strip() if start >= 0 else _last_boxed(completion)


def accuracy_reward(
    completions: Sequence[Any],
    answer: Sequence[Any],
    *,
    options: Sequence[Any] | None = None,
    tolerance: Sequence[Any] | None = None,
    time_limit: float = 5.0,
    **_: Any,
) -> list[float | None]:
    """1.0 where the extracted answer is the right one, else 0.0; None where a sample has no right answer.

    Compared in this order: text without regard to case, white space and what it is wrapped in; the letter or the text
    of an option; numbers with units, within the tolerance; lists item by item; mathematics by math-verify.

    Args:
        completions: Generated texts, or TRL's lists of messages.
        answer: Right answers, one a completion (a column of the data set): text, number, letter, yes/no as bool, or a
            list, which is met by the same items in the same order.
        options: Options of multiple choice, a list of texts each, or a mapping from letters; None where there are none.
        tolerance: How far a number may be off, absolute, or relative as text like "1%"; None for rounding errors only.
        time_limit: Seconds for one mathematical comparison.

    Raises:
        ValueError: Columns have other lengths than the completions, or a tolerance is none.

    >>> accuracy_reward(["<answer>Blue  circle</answer>", "<answer>3.0 cm</answer>", "3"], ["blue circle", 3, 3])
    [1.0, 1.0, 0.0]
    >>> accuracy_reward(["<answer>(B) cat</answer>", "<answer>cat</answer>"], ["B"] * 2, options=[["dog", "cat"]] * 2)
    [1.0, 1.0]
    """
    if len(completions) != len(answer):
        raise ValueError(
            f"{len(completions)} completions came with {len(answer)} answers, expected one answer a completion; "
            "check that every sample of the shards has an 'answer' field."
        )
    given = [extract_answer(text_of(completion)) for completion in completions]
    choices = options if options is not None else [None] * len(answer)
    margins = [parse_tolerance(value) for value in (tolerance if tolerance is not None else [None] * len(answer))]
    verdicts: list[float | None] = [0.0] * len(answer)
    unsure: dict[int, tuple[str, str]] = {}
    for index, (text, gold, choice, margin) in enumerate(zip(given, answer, choices, margins, strict=True)):
        if gold is None or gold == "":
            verdicts[index] = None
        elif text is not None:
            same = _same(text, gold, choice, margin, time_limit)
            if same is None:
                unsure[index] = (_unwrap(text), _unwrap(str(gold)))
            verdicts[index] = float(bool(same))
    for index, same in zip(unsure, same_expressions(list(unsure.values()), time_limit=time_limit), strict=True):
        verdicts[index] = float(same)
    return verdicts


def judge(completions: Sequence[Any], columns: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """`accuracy_reward` of samples whose columns come one mapping a sample."""
    answer, options, tolerance = (
        [column.get(name) for column in columns] for name in ("answer", "options", "tolerance")
    )
    return accuracy_reward(completions, answer, options=options, tolerance=tolerance)


def chosen_option(text: str, options: Any) -> str | None:
    """The letter of the option that an answer means; None where it means none, or several.

    Args:
        text: An answer: a letter, the text of an option, or both in agreement.
        options: A list of texts, or a mapping from letters; without any, every letter counts.

    >>> chosen_option("(B) cat", ["dog", "cat"]), chosen_option("A, B", ["dog", "cat"]), chosen_option("c", None)
    ('B', None, 'C')
    """
    return _chosen(text, _option_texts(options))


def format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the completion is exactly `<think>…</think><answer>…</answer>`, each tag once, else 0.0.

    >>> format_reward(["<think>2 + 2</think> <answer>4</answer>", "<answer>4</answer>"])
    [1.0, 0.0]
    """
    return [float(_FORMAT.fullmatch(text_of(completion)) is not None) for completion in completions]


def text_of(completion: Any) -> str:
    """A completion's text, also where it comes as chat messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        content = completion[-1].get("content") or ""
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return str(completion)


def _same(given: str, gold: Any, options: Any, tolerance: Tolerance, time_limit: float) -> bool | None:
    """Everything but mathematics; None where that must decide."""
    if isinstance(gold, bool):
        return _plain(given) in (("yes", "true") if gold else ("no", "false"))
    if isinstance(gold, (list, tuple)):
        items = _items(given)
        return len(items) == len(gold) and all(
            verdict == 1.0
            for verdict in accuracy_reward(
                [f"<answer>{item}</answer>" for item in items],
                [str(item) for item in gold],
                tolerance=[f"{tolerance.relative:.17%}" if tolerance.relative else tolerance.absolute] * len(items),
                time_limit=time_limit,
            )
        )
    right = str(gold)
    texts = _option_texts(options)
    if texts or _LETTER.fullmatch(right.strip()):
        return _same_option(given, right, texts)
    if _plain(given) == _plain(right):
        return True
    ours, theirs = parse_quantity(_unwrap(given)), parse_quantity(_unwrap(right))
    if ours is not None and theirs is not None:
        # A share may be written as a percentage; anything else that two numbers say is said.
        either = {ours.unit, theirs.unit} == {"", "%"}
        return ours.equals(theirs, tolerance) or (None if either else False)
    # Words would be taken for products of letters.
    return None if all(_MATHEMATICAL.search(text) for text in (given, right)) else False


def _same_option(given: str, gold: str, texts: dict[str, str]) -> bool:
    right = _chosen(gold, texts)
    return right is not None and _chosen(given, texts) == right


def _chosen(text: str, texts: dict[str, str]) -> str | None:
    """The letter that an answer means; None where it means none, or two."""
    plain = _plain(text)
    by_text = {_plain(option): letter for letter, option in texts.items()}
    if len(plain) > 1 and plain in by_text:
        return by_text[plain]
    found = _CHOICE.fullmatch(_unwrap(text))
    if found is None:
        return by_text.get(plain)
    letter, rest = (found[1] or found[2]).upper(), _plain(found[3])
    if texts and (letter not in texts or by_text.get(rest, letter) != letter):
        return None
    # "A, B" and "A) B)" choose nothing; "B. a cat" has its text behind it.
    others = {other.upper() for other in _ALONE.findall(found[3])} - {letter}
    return None if others and by_text.get(rest) != letter else letter


def _option_texts(options: Any) -> dict[str, str]:
    """Options by letter."""
    if not options or isinstance(options, str):
        return {}
    if isinstance(options, Mapping):
        return {str(letter).upper(): str(text) for letter, text in options.items() if text is not None}
    lettered = (
        re.sub(rf"^\(?{letter}[.):]\s+", "", str(text)) for letter, text in zip(string.ascii_uppercase, options)
    )
    return dict(zip(string.ascii_uppercase, lettered))


def _items(text: str) -> list[str]:
    """Items of a list that was written down."""
    text = _unwrap(text)
    if len(text) > 1 and text[0] + text[-1] in ("[]", "()", "{}"):
        text = text[1:-1]
    return [item.strip() for item in re.split(r"[;,]|\band\b", text) if item.strip()]


def _plain(text: str) -> str:
    """For comparison: unwrapped, without case, runs of white space and a last full stop."""
    return " ".join(_unwrap(text).rstrip(".").casefold().split())


def _unwrap(text: str) -> str:
    """Without the mark-up around the whole of it."""
    text = text.strip()
    for _ in range(4):
        before = text
        for opening, closing in _WRAPPINGS:
            if len(text) >= len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
                text = text[len(opening) : len(text) - len(closing)].strip()
        for command in (r"\boxed{", r"\text{", r"\mathrm{", r"\textbf{"):
            if text.startswith(command) and _closing_brace(text, len(command)) == len(text) - 1:
                text = text[len(command) : -1].strip()
        if text == before:
            break
    return text


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    end = _closing_brace(text, start)
    return None if end is None else text[start:end].strip()


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace before `start` is closed."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return None
