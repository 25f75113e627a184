"""Convert a data set into shards: one process finds records, others make shards of them, and all or none are kept.

The result depends on the input and the options alone, not on the number of processes or on interruptions. What is held
in memory does not grow with the input: addresses of the records of a few chunks, and in each process one sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from avar_lightning.conversion.chunks import Chunk, Job, Stopped, work_on
from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import FORMATS, Format, detect_format
from avar_lightning.conversion.processes import open_pool
from avar_lightning.conversion.rejecting import Tally
from avar_lightning.conversion.sources import Source, find_source
from avar_lightning.conversion.workfolder import ORIGIN, REJECTED, WorkFolder

FIRST_RECORDS = 20  # by whose fields the format is told


@dataclass(frozen=True)
class Reading:
    """Records and what they mean, where input and format do not say it.

    Attributes:
        source: The records.
        name: What a report calls their format.
        read: What one of them means; a function of a module, since other processes call it.
        origin: Where the records come from, for the manifest.
    """

    source: Source
    name: str
    read: Format
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        dst: The folder of the shards.
        format: The format that was given or told.
        records: Records that were read.
        samples: Samples that were written.
        shards: Number of shards.
        bytes: Their size.
        left_out: Records that are none of those asked for.
        rejected: Records that cannot become samples, by kind of reason.
        reasons: A line for each kind, with an example.
        seconds: How long it took.
    """

    dst: Path
    format: str
    records: int
    samples: int
    shards: int
    bytes: int
    left_out: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.samples / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.records} records ({self.format}): {self.samples} samples in {self.shards} shard(s), "
            f"{self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s, {rate:.0f} samples/s",
        ]
        if self.left_out:
            lines.append(f"{self.left_out} left out, which belong to another version or split")
        if self.rejected:
            lines.append(f"{sum(self.rejected.values())} rejected, each in {self.dst / REJECTED}:")
            lines += [f"  {reason}" for reason in self.reasons]
        return "\n".join(lines)


def convert(config: ConvertConfig, *, progress: bool = True, reading: Reading | None = None) -> ConversionReport:
    """Convert a data set into shards.

    Records that cannot become samples are listed in ``rejected.jsonl`` beside the shards. An interrupted conversion
    goes on when it is called again with the same input and options.

    Args:
        config: The input, the folder of the shards, and how to read the one into the other.
        progress: Show a progress bar.
        reading: The records and what they mean; default: what ``config.src`` and ``config.format`` say.

    Raises:
        FileNotFoundError: When there is no such input.
        FileExistsError: When the folder holds shards and ``config.overwrite`` is false.
        ValueError: When the input is none that can be read, has no record, or too many of them are rejected.
        RuntimeError: When the disk fails or a process dies.
    """
    started = time.monotonic()
    reading = reading or _reading_of(config)
    source = reading.source
    if Path(config.dst).resolve() == source.folder.resolve():
        raise ValueError(f"{config.dst} is where the input is; give the shards a folder of their own")
    work, tally = WorkFolder(config.dst), Tally()
    with work.alone():
        manifest = work.begin(_plan(reading, config), overwrite=config.overwrite)
        if manifest is None:
            _count(Job(source, reading.read, config), tally, progress)
            _judge(tally, config, work)
            manifest = work.publish()
        else:
            tally = work.read_rejected()
            tally.left_out = manifest["left_out"]
            tally.records = manifest["samples"] + tally.num_rejected + tally.left_out
            work.remove()
    shards = manifest["shards"]
    return ConversionReport(
        dst=Path(config.dst),
        format=reading.name,
        records=tally.records,
        samples=tally.num_samples,
        shards=len(shards),
        bytes=sum(shard["bytes"] for shard in shards),
        left_out=tally.left_out,
        rejected=tally.rejected,
        reasons=tally.lines(),
        seconds=time.monotonic() - started,
    )


def _count(job: Job, tally: Tally, progress: bool) -> None:
    """Convert the chunks and count their records; stop early once no record that is left can keep the limit."""
    most = _most_records(job.source, job.config)
    with _ProgressBar(job.source, job.config, disable=not progress) as show:
        for chunk, counts in _convert_chunks(job):
            tally.add(counts)
            show(job.source.position(chunk.addresses[-1]), tally)
            if most is not None and tally.num_rejected / most > job.config.max_rejected:
                break


def _most_records(source: Source, config: ConvertConfig) -> int | None:
    """No more records than these are converted; None where the input has to be read to know."""
    return min((count for count in (source.total_records, config.limit) if count is not None), default=None)


def _reading_of(config: ConvertConfig) -> Reading:
    source = find_source(config.src, config.split)
    name = _format_of(source, config)
    return Reading(source, name, FORMATS[name])


def _format_of(source: Source, config: ConvertConfig) -> str:
    if config.format != "auto":
        if config.format not in FORMATS:
            raise ValueError(f"format is {config.format!r}; expected auto or one of {', '.join(FORMATS)}")
        return config.format
    records = [record for _, record in source.read(islice(source.addresses(), FIRST_RECORDS))]
    if not records:
        raise ValueError(f"{config.src} holds no record; expected at least one")
    fields = {name: None for record in records if isinstance(record, dict) for name in record}
    if not fields:
        raise ValueError(f"the first {len(records)} record(s) of {config.src} cannot be read: {records[0]}")
    return detect_format(fields, config)


def _plan(reading: Reading, config: ConvertConfig) -> dict[str, Any]:
    """What must be the same for an interrupted conversion to go on."""
    source = reading.source
    sizes = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files]
    options = ("columns", "drop", "system", "source", "prepend_images", "samples_per_shard", "limit")
    return {
        "input": sizes,
        "images": str(Path(config.images or source.folder).resolve()),
        "format": reading.name,
        **{name: getattr(config, name) for name in options},
        **({ORIGIN: dict(reading.origin)} if reading.origin else {}),
    }


def _chunks(source: Source, config: ConvertConfig) -> Iterator[Chunk]:
    addresses = islice(source.addresses(), config.limit)
    number = 0
    while members := list(islice(addresses, config.samples_per_shard)):
        yield Chunk(number, number * config.samples_per_shard, members)
        number += 1


def _convert_chunks(job: Job) -> Iterator[tuple[Chunk, Tally]]:
    """Counts of every chunk, in the order in which they are finished; those of an earlier call come at once."""
    chunks = _chunks(job.source, job.config)
    head = list(islice(chunks, 2))
    try:
        with open_pool(job.config.num_workers if len(head) > 1 else 1, job) as run:  # one chunk needs no processes
            yield from run(work_on, chain(head, chunks))
    except Stopped as error:
        raise RuntimeError(str(error)) from error


def _judge(tally: Tally, config: ConvertConfig, work: WorkFolder) -> None:
    """Raise ValueError when there is nothing, or too little that is good, to be kept."""
    if not tally.records:
        work.remove()
        raise ValueError(f"{config.src} holds no record; expected at least one")
    if tally.left_out == tally.records:
        work.remove()
        raise ValueError(f"{config.src} holds {tally.records} record(s), but none of those asked for")
    wanted = tally.records - tally.left_out
    share = tally.num_rejected / wanted
    if share <= config.max_rejected and share < 1:
        return
    path = work.judge()
    raise ValueError(
        f"{tally.num_rejected} of {wanted} records are rejected, more than max_rejected "
        f"{config.max_rejected:g} allows, so no shards are written: {'; '.join(tally.lines()[:3])}. "
        f"Each is in {path}; mend them and call again with --overwrite, or leave them out with a larger --max-rejected"
    )


class _ProgressBar:
    """A bar over records where their number is known, else over the bytes of the input."""

    def __init__(self, source: Source, config: ConvertConfig, *, disable: bool) -> None:
        total = _most_records(source, config)
        self._bytes = total is None and source.total_bytes is not None
        unit: dict[str, Any] = {"unit": "sample", "total": total}
        if self._bytes:
            unit = {"unit": "B", "unit_scale": True, "total": source.total_bytes}
        self._bar = tqdm(desc=f"converting {config.src}", disable=disable, **unit)
        self._started = time.monotonic()

    def __enter__(self) -> Callable[[int, Tally], None]:
        return self._show

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def _show(self, position: int, tally: Tally) -> None:
        rate = tally.records / max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(
            f"{tally.records} records, {rate:.0f}/s, {tally.num_rejected} rejected", refresh=False
        )
        self._bar.update(max((position if self._bytes else tally.records) - self._bar.n, 0))
