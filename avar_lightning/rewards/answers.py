"""Rewards: how good a completion is, as callables with TRL's signature `(completions, **columns) -> list[float]`."""

from __future__ import annotations

import re
from typing import Any

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def extract_answer(completion: str) -> str | None:
    """The text inside the last `<answer>…</answer>`, stripped; `None` where there is no complete pair.

    >>> extract_answer("<think>2 + 2</think><answer> 4 </answer>")
    '4'
    >>> extract_answer("4") is None
    True
    """
    found = _ANSWER.findall(completion)
    return found[-1].strip() if found else None


def accuracy_reward(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
    """1.0 where the extracted answer equals the gold one, else 0.0.

    Strings are compared without regard to case and runs of white space; where both sides are numbers, as numbers.

    Args:
        completions: Generated texts.
        answer: Gold answers, one a completion (a column of the data set).

    >>> accuracy_reward(["<answer>Blue  circle</answer>", "<answer>3.0</answer>", "3"], ["blue circle", 3, 3])
    [1.0, 1.0, 0.0]
    """
    if len(completions) != len(answer):
        raise ValueError(
            f"{len(completions)} completions came with {len(answer)} answers, expected one answer a completion; "
            "check that every sample of the shards has an 'answer' field."
        )
    return [float(_same(extract_answer(text), str(gold))) for text, gold in zip(completions, answer)]


def _same(given: str | None, gold: str) -> bool:
    if given is None:
        return False
    try:
        return float(given) == float(gold)
    except ValueError:
        return " ".join(given.lower().split()) == " ".join(gold.lower().split())


_FORMAT = re.compile(
    r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*", re.DOTALL
)


def format_reward(completions: list[str], **_: Any) -> list[float]:
    """1.0 where the completion is exactly `<think>…</think><answer>…</answer>`, each tag once, else 0.0.

    >>> format_reward(["<think>2 + 2</think> <answer>4</answer>", "<answer>4</answer>"])
    [1.0, 0.0]
    """
    return [float(_FORMAT.fullmatch(text) is not None) for text in completions]
