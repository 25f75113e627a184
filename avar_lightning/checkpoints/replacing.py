"""Files and folders that take a name only when they are whole, and lose it before they are taken apart.

What is being written is called ``NAME.tmp``, and gets its name by a rename. A file takes the place of another one in a
single step. For folders there is no such step: the old one is ``NAME.old`` for a moment, and whoever comes next puts it
back if the new one did not take its place. So a name stands for something whole at all times; :func:`sweep` removes the
rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

TMP, OLD = ".tmp", ".old"
# What a disk, a quota or a limit says when it takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def beside(path: str | Path) -> Path:
    """Where something is written that will be called `path`."""
    return Path(path).with_name(Path(path).name + TMP)


def put(unfinished: Path, path: str | Path) -> None:
    """Give what is written its name, in place of what has it now."""
    path, old = Path(path), Path(path).with_name(Path(path).name + OLD)
    _to_disk(unfinished)
    if not (_is_folder(unfinished) or _is_folder(path)):
        os.replace(unfinished, path)
    else:
        _delete(old)
        if os.path.lexists(path):
            os.rename(path, old)
        os.rename(unfinished, path)
        _delete(old)
    _sync(path.parent)


@contextlib.contextmanager
def replaced(path: str | Path, hint: str) -> Iterator[Path]:
    """Give a place to write in, which takes the name of `path` at the end of the block.

    Whatever goes wrong in the block, what was there stays, and what was written is removed.

    Args:
        path: Of a file or folder; there need be nothing yet.
        hint: As of :func:`room_for`.
    """
    recover(path)
    unfinished = beside(path)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    _delete(unfinished)
    try:
        with room_for(path, hint):
            yield unfinished
            put(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            _delete(unfinished)
        raise


def remove(path: str | Path) -> None:
    """Delete a file or folder; from the first step on it has no name that could be taken for a whole one's."""
    unfinished = beside(path)
    _delete(unfinished)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, unfinished)
    _delete(unfinished)


def recover(path: str | Path) -> None:
    """Give an old folder its name back, where a process was killed before the new one had it; call it before reading.

    Another process may be about to give the name, so it has a moment to do so.
    """
    path = Path(path)
    old = path.with_name(path.name + OLD)
    for wait in (True, False):
        if os.path.lexists(path) or not old.exists():
            return
        if wait:
            time.sleep(0.5)
        else:
            with contextlib.suppress(OSError):  # another process did
                os.rename(old, path)


def sweep(folder: str | Path, suffix: str) -> None:
    """End what killed processes began in a folder; call it before anything is written there, in one process."""
    for old in Path(folder).glob(f"*{suffix}{OLD}"):
        recover(old.with_name(old.name.removesuffix(OLD)))
    for rest in (*Path(folder).glob(f"*{suffix}{OLD}"), *Path(folder).glob(f"*{suffix}{TMP}*")):
        _delete(rest)


@contextlib.contextmanager
def room_for(path: str | Path, hint: str) -> Iterator[None]:
    """Say in one sentence that a disk is full, and leave nothing half-written."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is none of the former
        reason = _full(error)
        if reason is None:
            raise
        with contextlib.suppress(OSError):
            _delete(beside(path))
        raise OSError(f"{path} cannot be written ({reason}): {hint}") from error


def _full(error: BaseException | None) -> str | None:
    """Why nothing more could be written, however deep torch wrapped it; None for another error."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return os.strerror(error.errno)
        # torch.distributed.checkpoint keeps the errors of all processes in a dictionary of its own.
        failures = getattr(error, "failures", None)
        if isinstance(failures, dict) and failures:
            wrapped = next(iter(failures.values()))
            found = _full(wrapped[0] if isinstance(wrapped, tuple) else wrapped)
            if found:
                return found
        error = error.__cause__ or error.__context__
    return None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _to_disk(path: Path) -> None:
    """Have everything written, so that no crash of the machine leaves a name without its content."""
    if path.is_symlink():
        return
    if path.is_dir():
        for part in path.rglob("*"):
            if part.is_file():
                _sync(part)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
