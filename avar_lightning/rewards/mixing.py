"""Several reward functions and their weights: called with all columns, sync or async, and added up."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avar_lightning.background import wait_for

RewardFunction = Callable[..., Any]


@dataclass
class RewardConfig:
    """One part of the reward: a function and its weight."""

    function: str | RewardFunction
    """TRL's signature, `(completions, **columns) -> list of float or None`, or a coroutine; as "package.module.name",
    "folder/file.py:name", or the function itself. None means that the part does not apply to a completion."""
    weight: float = 1.0
    """Factor in the total reward."""
    name: str = ""
    """In `reward/<name>`; by default that of the function without "_reward"."""

    def __post_init__(self) -> None:
        """Name it."""
        if not self.name:
            function = self.function
            last = _last_name(function) if isinstance(function, str) else getattr(function, "__name__", "reward")
            self.name = last.removesuffix("_reward")

    def load(self) -> RewardFunction:
        """The function itself.

        Raises:
            ValueError: There is no such module, file or function.
        """
        return load_function(self.function) if isinstance(self.function, str) else self.function

    @property
    def as_plain(self) -> dict[str, Any]:
        """The same as plain types, for checkpoints; a function given itself is named by where it is defined."""
        function = self.function
        if not isinstance(function, str):
            function = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        return {"function": function, "weight": self.weight, "name": self.name}


def _last_name(path: str) -> str:
    """The function's name in a path to it."""
    return path.replace(":", ".").rpartition(".")[2]


def load_function(path: str) -> RewardFunction:
    """Import "package.module.name" or "folder/file.py:name".

    Raises:
        ValueError: There is no such module, file or function.
    """
    file, colon, name = path.rpartition(":")
    try:
        if colon:
            source = Path(file).expanduser()
            spec = importlib.util.spec_from_file_location(f"_reward_{source.stem}", source)
            if spec is None or spec.loader is None or not source.is_file():
                raise ImportError(f"no Python file {file!r}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module_name, _, name = path.rpartition(".")
            if not module_name:
                raise ImportError("it names no module")
            module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward function {path!r} cannot be loaded ({error}), expected 'package.module.name' or "
            "'folder/file.py:name'; correct the path."
        ) from error
    if not callable(function):
        raise ValueError(f"reward function {path!r} is a {type(function).__name__}, expected something to call.")
    return function


def call_rewards(
    functions: Mapping[str, RewardFunction], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> dict[str, list[float]]:
    """Ask every reward function; coroutines run side by side.

    Args:
        functions: By name.
        completions: What is judged.
        columns: Every column of the data set, one value a completion, and whatever else the caller knows.

    Returns:
        For each function one value a completion, NaN where the function gave None.

    Raises:
        ValueError: A function gave another number of values, or something that is no finite number.
    """
    found = {name: function(completions=completions, **columns) for name, function in functions.items()}
    waiting = {name: value for name, value in found.items() if inspect.isawaitable(value)}
    if waiting:
        found |= dict(zip(waiting, wait_for(_all_of(list(waiting.values()))), strict=True))
    return {name: _checked(name, values, len(completions)) for name, values in found.items()}


async def _all_of(awaitables: list[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables)


def _checked(name: str, values: Any, count: int) -> list[float]:
    try:
        numbers = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward {name!r} gave {values!r:.80}, expected a list of numbers or None ({error})."
        ) from error
    if len(numbers) != count:
        raise ValueError(f"reward {name!r} gave {len(numbers)} values for {count} completions, expected one each.")
    bad = [
        value for value, given in zip(numbers, values, strict=True) if given is not None and not math.isfinite(value)
    ]
    if bad:
        raise ValueError(
            f"reward {name!r} gave {bad[0]}, expected a finite number or None; mend the function, training has stopped."
        )
    return numbers


def total_reward(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """The weighted sum of the parts of each completion; a part that is NaN does not apply and adds nothing.

    >>> total_reward({"accuracy": [1.0, 0.0], "format": [1.0, float("nan")]}, {"accuracy": 1.0, "format": 0.1})
    [1.1, 0.0]
    """
    rows = zip(*(parts[name] for name in parts), strict=True)
    return [
        math.fsum(weights[name] * value for name, value in zip(parts, row, strict=True) if not math.isnan(value))
        for row in rows
    ]
