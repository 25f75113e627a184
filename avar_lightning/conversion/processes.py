"""Processes that work on chunks or shards, never many ahead of what is done, and end with whoever called them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Set once in each process of a pool.
_shared: Any = None
_interrupted: Callable[[], bool] = bool


class Interrupted(Exception):
    """Raised in a process of a pool that is given up."""


class Run(Protocol):
    """Apply a function to items; results come in the order in which they are ready."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results."""


def shared() -> Any:
    """What the pool was opened with."""
    return _shared


def check_interrupted() -> None:
    """Raise :class:`Interrupted` when nobody waits for the result any more."""
    if _interrupted():
        raise Interrupted


@contextmanager
def open_pool(workers: int, share: Any = None) -> Iterator[Run]:
    """Processes for the length of a block, or with one worker this process.

    Args:
        workers: Number of processes.
        share: What :func:`shared` returns in each of them; sent once.

    Raises:
        RuntimeError: When a process dies.
    """
    global _shared
    if workers <= 1:
        before, _shared = _shared, share
        try:
            yield lambda function, items: map(function, items)
        finally:
            _shared = before
        return
    # A server forks the workers: they start at once, and inherit no thread of a program that has torch.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["avar_lightning.conversion"])
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start, (share, stop.is_set))
    try:
        yield lambda function, items: _run(pool, function, items, 2 * workers)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process died, maybe for want of memory; call it again to go on, with fewer --workers"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _run(
    pool: ProcessPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[Result]:
    waiting: set[Future[Result]] = set()
    for item in items:
        if len(waiting) >= most:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
        waiting.add(pool.submit(function, item))
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _start(share: Any, interrupted: Callable[[], bool]) -> None:
    global _shared, _interrupted
    _shared, _interrupted = share, interrupted
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others

    def end_with(parent: Any) -> None:
        parent.join()  # also when it was killed
        os._exit(1)

    threading.Thread(target=end_with, args=[parent_process()], daemon=True).start()
