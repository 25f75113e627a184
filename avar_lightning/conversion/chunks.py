"""A run of records into one shard: what each process of a conversion does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Format
from avar_lightning.conversion.images import ImageFolder
from avar_lightning.conversion.processes import check_interrupted, shared
from avar_lightning.conversion.rejecting import BadRecord, Rejection, Tally
from avar_lightning.conversion.sources import Source
from avar_lightning.conversion.workfolder import WorkFolder
from avar_lightning.data.sample import check_messages
from avar_lightning.data.writer import ShardFile


class Stopped(Exception):
    """A chunk that was not finished, because of the message."""


@dataclass(frozen=True)
class Job:
    """What is the same for all chunks.

    Attributes:
        source: The records.
        read: What one of them means.
        config: What was asked for.
    """

    source: Source
    read: Format
    config: ConvertConfig


@dataclass(frozen=True)
class Chunk:
    """Records that make one shard.

    Attributes:
        number: Its place among the chunks.
        first: Number of its first record in the input.
        addresses: Where its records stand.
    """

    number: int
    first: int
    addresses: list[tuple[Any, ...]]


def work_on(chunk: Chunk) -> tuple[Chunk, Tally]:
    """:func:`convert_chunk` for the :class:`Job` that the pool was opened with."""
    return chunk, convert_chunk(shared(), chunk)


def convert_chunk(job: Job, chunk: Chunk) -> Tally:
    """Write the good samples of a chunk into its tar, and then its report, unless an earlier call has.

    Raises:
        Stopped: When the input or the disk fails.
    """
    work = WorkFolder(job.config.dst)
    if (counts := work.finished(chunk.number)) is not None:
        return counts
    path = work.tar(chunk.number)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        shard = ShardFile(unfinished)
        try:
            tally, rejections = _fill(shard, job, chunk)
        except BaseException:
            shard.discard()
            raise
        entry = shard.close()
        if shard.samples:
            unfinished.replace(path)
        else:
            unfinished.unlink()
        work.finish(chunk.number, tally, entry if shard.samples else None, rejections)
    except OSError as error:
        raise Stopped(f"the conversion stopped ({error}); call it again to go on once that is mended") from error
    return tally


def _fill(shard: ShardFile, job: Job, chunk: Chunk) -> tuple[Tally, list[Rejection]]:
    images, tally = ImageFolder(job.config.images or job.source.folder), Tally()
    rejections = []
    for index, (where, record) in enumerate(job.source.read(chunk.addresses), chunk.first):
        check_interrupted()
        tally.records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            tally.left_out += not _add(shard, f"{index:08d}", record, job, images)
        except BadRecord as error:
            name = record.get(job.config.names("id")[0]) if isinstance(record, dict) else None
            name = _printable(str(name)) if isinstance(name, str | int) else None
            rejections.append(Rejection(index, _printable(where), error.kind, _printable(error.reason), name))
            tally.reject(rejections[-1])
    return tally, rejections


def _add(shard: ShardFile, key: str, record: dict[str, Any], job: Job, images: ImageFolder) -> bool:
    """Write a record's sample; false where it is left out."""
    try:
        draft = job.read(record, job.config)
        if draft is None:
            return False
        try:
            check_messages(draft.messages, len(draft.images))
        except ValueError as error:
            raise BadRecord("bad conversation", str(error)) from error
        files = [images.load(reference) for reference in draft.images]
        shard.add(key, draft.sample(key), files)
        return True
    except RecursionError as error:  # as below, before a byte was written
        raise BadRecord(
            "nested too deeply", "a field is nested too deeply to be written; flatten it or leave it out with --drop"
        ) from error
    except UnicodeEncodeError as error:
        raise BadRecord(
            "bad text", f"its text is no Unicode ({error}); expected no half of a surrogate pair"
        ) from error


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
