"""Turn files that are ready into the shards of a folder: all of them or none, whenever it is killed.

Two notes in ``FOLDER/.unfinished`` say what is to be done: ``moves.json`` which file gets which name, and
``publish.json``, by which readers refuse the folder. Then old shards are deleted and files renamed, and at last
``publish.json`` itself, which is the manifest, becomes ``manifest.json``. So a manifest never lies beside a part of its
shards, nor beside shards that readers refuse. Whoever publishes next ends what was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avar_lightning.data.shards import MANIFEST, PUBLICATION, UNFINISHED
from avar_lightning.files import write_json

log = logging.getLogger(__name__)

_MOVES = f"{UNFINISHED}/moves.json"
_NEXT = f"{UNFINISHED}/{MANIFEST}"


@contextmanager
def alone(folder: str | Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Keep others that publish out of a folder for the length of a block; a process that dies lets them in.

    Args:
        folder: An existing folder.
        seconds: How long to wait for another one.

    Raises:
        RuntimeError: When another one is still at work there.
    """
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    try:
        while not _lock(handle, folder):
            if time.monotonic() >= end:
                raise RuntimeError(
                    f"another process converts into {folder} or writes shards there; wait for it, or give another "
                    "folder"
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def publish(folder: str | Path, moves: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
    """Make files the data set of a folder, in place of all shards that it holds; call it :func:`alone`.

    Args:
        folder: The folder of the shards.
        moves: Names of the files, by where they are; both inside of the folder, and on its file system.
        manifest: What ``manifest.json`` will say.
    """
    folder = Path(folder)
    recover(folder, overwrite=True)
    sizes = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    # Whatever needs room on the disk comes before the first change.
    write_json(folder / _MOVES, [[source, target, sizes.get(target)] for source, target in moves.items()])
    write_json(folder / _NEXT, manifest)
    (folder / MANIFEST).unlink(missing_ok=True)
    os.replace(folder / _NEXT, folder / PUBLICATION)
    _finish(folder, _moves(folder) or [])


def recover(folder: str | Path, *, overwrite: bool) -> None:
    """End a publication that was interrupted; call it :func:`alone`.

    Args:
        folder: The folder of the shards.
        overwrite: Where files of it were lost meanwhile, delete the rest.

    Raises:
        FileExistsError: When files were lost and ``overwrite`` is false.
    """
    folder = Path(folder)
    if not (folder / PUBLICATION).exists():
        return
    moves = _moves(folder)
    if moves is not None:
        _finish(folder, moves)
        return
    if not overwrite:
        raise FileExistsError(
            f"shards were being moved into {folder} when it was interrupted, and some of them are gone since; pass "
            "overwrite=True (--overwrite) to delete the rest and write them again"
        )
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("*.tar"):
        path.unlink(missing_ok=True)
    (folder / PUBLICATION).unlink()
    _forget(folder)


def _moves(folder: Path) -> list[tuple[str, str]] | None:
    """What an interrupted publication moves; None where it cannot be ended."""
    try:
        names = [shard["name"] for shard in json.loads((folder / PUBLICATION).read_text())["shards"]]
        moves = [(source, target, size) for source, target, size in json.loads((folder / _MOVES).read_text())]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if {target for _, target, size in moves if size is not None} != set(names):
        return None
    for source, target, size in moves:
        path = next((folder / name for name in (source, target) if (folder / name).is_file()), None)
        if size is not None and (path is None or path.stat().st_size != size):
            return None
    return [(source, target) for source, target, _ in moves]


def _finish(folder: Path, moves: list[tuple[str, str]]) -> None:
    """The steps after the notes; each may be the last of one process and the first of another."""
    (folder / MANIFEST).unlink(missing_ok=True)
    moved = {target for source, target in moves if not (folder / source).exists()}
    for path in folder.glob("*.tar"):
        if path.name not in moved:
            path.unlink(missing_ok=True)
    for source, target in moves:
        if target not in moved:
            os.replace(folder / source, folder / target)
    os.replace(folder / PUBLICATION, folder / MANIFEST)
    _forget(folder)


def _forget(folder: Path) -> None:
    (folder / _MOVES).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a conversion has more in it
        (folder / UNFINISHED).rmdir()


def _lock(handle: int, folder: str | Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s); let no other process write shards there meanwhile", folder, error)
    return True
