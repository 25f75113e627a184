"""Break off a program between any two steps that change names of files, as a kill would."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest


class Broken(BaseException):
    """As a kill between any two steps."""


@contextlib.contextmanager
def killed(
    monkeypatch: pytest.MonkeyPatch, stop: int, steps: tuple[str, ...] = ("replace", "unlink", "rmdir")
) -> Iterator[list[str]]:
    """Die before a step that changes names, with no step after it; says which, nothing where there are not so many."""
    count, seen = itertools.count(), list[str]()

    def step(name: str, real: Any) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            if next(count) >= stop:
                seen.append(name)
                raise Broken
            return real(*args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        for name in steps:
            patch.setattr(os, name, step(name, getattr(os, name)))
        with contextlib.suppress(Broken):
            yield seen
