"""Whether two mathematical expressions are equal, decided by math-verify in a process that can be stopped.

Simplifying a strange expression may take for ever inside one call of the interpreter, where no signal is heard, so the
work is done elsewhere and killed when its time is up. This module imports nothing of the package, since each of these
processes imports it. Expressions are read as LaTeX, by a grammar; sympy's own parser, which evaluates Python, is not
used.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import TimeoutError
from functools import cache

from pebble import ProcessExpired, ProcessPool

log = logging.getLogger(__name__)

MAX_LENGTH = 400
"""Expressions with more characters are not compared."""


def same_expressions(pairs: Sequence[tuple[str, str]], *, time_limit: float = 5.0) -> list[bool]:
    """Whether given and right expression of each pair are equal.

    Args:
        pairs: Given and right expression, LaTeX or plain.
        time_limit: Seconds for each pair; one that takes longer counts as different.

    Example:
        >>> same_expressions([("3/4", r"\\frac{3}{4}")])  # doctest: +SKIP
        [True]
    """
    if not pairs:
        return []
    wanted = list(dict.fromkeys(pair for pair in pairs if max(map(len, pair)) <= MAX_LENGTH))
    futures = {pair: _pool().schedule(_same, args=pair, timeout=time_limit) for pair in wanted}
    found = {}
    for pair, future in futures.items():
        try:
            found[pair] = bool(future.result())
        except TimeoutError:
            log.warning("%r and %r could not be compared within %g s; they count as different", *pair, time_limit)
        except ProcessExpired as error:
            log.warning("comparing %r and %r ended its process (%s); they count as different", *pair, error)
    return [found.get(pair, False) for pair in pairs]


@cache
def _pool() -> ProcessPool:
    # Not forked: the training process holds threads and a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(max_workers=min(4, os.cpu_count() or 1), context=context)
    atexit.register(pool.stop)
    return pool


def _same(given: str, gold: str) -> bool:
    """In a process of its own."""
    logging.disable(logging.CRITICAL)  # math-verify says for each pair that nobody watches the clock; the pool does
    from math_verify import LatexExtractionConfig, parse, verify

    reading = [LatexExtractionConfig()]
    right, answer = (parse(f"\\boxed{{{text}}}", reading, parsing_timeout=None) for text in (gold, given))
    return bool(verify(right, answer, timeout_seconds=None))
