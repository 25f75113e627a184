"""Whether two mathematical expressions are equal, decided by math-verify in a process that can be stopped.

Simplifying a strange expression may take for ever inside one call of the interpreter, where no signal is heard, so the
work is done by other processes, which are killed when their time is up. They are started as programs of their own
(`python -m avar_lightning.mathematics`), not with multiprocessing, which would run the user's script again in each; so
this module imports nothing of the package. Expressions are read as LaTeX, by a grammar; sympy's own parser, which
evaluates Python, is not used.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

log = logging.getLogger(__name__)

MAX_LENGTH = 400
"""Expressions with more characters are not compared."""
START_LIMIT = 120.0
"""Seconds for a process to import what it needs."""


def same_expressions(pairs: Sequence[tuple[str, str]], *, time_limit: float = 5.0) -> list[bool]:
    """Whether given and right expression of each pair are equal.

    Args:
        pairs: Given and right expression, LaTeX or plain.
        time_limit: Seconds for each pair; one that takes longer counts as different.

    >>> same_expressions([("3/4", r"\\frac{3}{4}"), ("2x", "x^2")])
    [True, False]
    """
    wanted = list(dict.fromkeys(pair for pair in pairs if max(map(len, pair)) <= MAX_LENGTH))
    if not wanted:
        return [False] * len(pairs)

    def decide(pair: tuple[str, str]) -> bool:
        judge = _judges().get()
        try:
            return judge.same(*pair, time_limit=time_limit)
        finally:
            _judges().put(judge)

    with ThreadPoolExecutor(_judges().maxsize) as threads:
        found = dict(zip(wanted, threads.map(decide, wanted), strict=True))
    return [found.get(pair, False) for pair in pairs]


class _Judge:
    """One process, started when it is first needed, and anew after it was stopped."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def same(self, given: str, gold: str, *, time_limit: float) -> bool:
        try:
            process = self._running()
            assert process.stdin is not None
            process.stdin.write(json.dumps([given, gold]) + "\n")
            process.stdin.flush()
            return bool(json.loads(self._line(process, time_limit)))
        except (TimeoutError, OSError, ValueError) as error:
            log.warning("%r and %r could not be compared (%s); they count as different", given, gold, error)
            self._stop()
            return False

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", __spec__.name]
            # A judge ends with its parent, whose end closes this pipe.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=_path(),
            )
            self._line(self.process, START_LIMIT)
        return self.process

    def _line(self, process: subprocess.Popen[str], limit: float) -> str:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], limit)[0]:
            raise TimeoutError(f"no answer within {limit:g} s")
        line = process.stdout.readline()
        if not line:
            raise OSError("its process ended")
        return line

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@cache
def _judges() -> queue.Queue[_Judge]:
    count = min(4, os.cpu_count() or 1)
    judges: queue.Queue[_Judge] = queue.Queue(count)
    for _ in range(count):
        judges.put(_Judge())
    return judges


def _path() -> dict[str, str]:
    """The environment, with the modules that this process can import."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _serve() -> None:
    """Answer pairs from standard input, a line each."""
    logging.disable(logging.CRITICAL)  # math-verify says for each pair that nobody watches the clock; the parent does
    from math_verify import LatexExtractionConfig, parse, verify

    reading = [LatexExtractionConfig()]
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        given, gold = json.loads(line)
        try:
            right, answer = (parse(f"\\boxed{{{text}}}", reading, parsing_timeout=None) for text in (gold, given))
            same = bool(verify(right, answer, timeout_seconds=None))
        except Exception:  # a parser of other people's text
            same = False
        print(json.dumps(same), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
