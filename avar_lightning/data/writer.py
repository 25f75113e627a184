"""Write shards: WebDataset tars beside a manifest, all of them or none."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import webdataset as wds
from PIL import Image
from tqdm.auto import tqdm

from avar_lightning.data.publishing import alone, publish, recover
from avar_lightning.data.sample import Sample, SampleError, check_messages
from avar_lightning.data.shards import PUBLICATION

WAIT = 60.0  # seconds for another process that moves its shards into the same folder


class ShardFile:
    """One shard on its way to disk; its size and checksum are known without reading it again.

    Args:
        path: The file that is written; give it its name once :meth:`close` has returned.
    """

    def __init__(self, path: Path) -> None:
        self.samples = self.bytes = 0
        self._hash = hashlib.sha256()
        self._path = path
        self._file = path.open("wb")
        self._tar = wds.TarWriter(self, encoder=False, mtime=0, format="PAX_FORMAT")

    def add(self, key: str, sample: Sample, files: Sequence[tuple[str, bytes]]) -> None:
        """Append a sample that was checked; ``files`` are the suffix and the bytes of its images."""
        document = {"messages": sample.messages, **sample.fields(), "id": sample.id or key}
        record: dict[str, Any] = {"__key__": key, "json": json.dumps(document, ensure_ascii=False).encode()}
        for index, (suffix, value) in enumerate(files):
            record[f"{index}.{suffix}"] = value
        self._tar.write(record)
        self.samples += 1

    def write(self, block: bytes) -> int:
        """Take a block of the tar, as a file does."""
        self._hash.update(block)
        self.bytes += len(block)
        return self._file.write(block)

    def close(self) -> dict[str, Any]:
        """Finish the file; returns what a manifest says of it beside its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())  # a power cut must not leave less under the name that it gets next
        self._file.close()
        return {"samples": self.samples, "bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        """Give the file up and delete it."""
        with contextlib.suppress(OSError):  # a full disk, which may be why it is given up
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


class ShardWriter:
    """Write samples into numbered shards of a folder, all of them or none.

    Everything goes to ``*.tmp`` files, which get their names when the ``with`` block ends well and are
    deleted when it does not. Killed while they get them, readers refuse the folder until the next writer there ends
    it. The bytes depend on the samples alone: equal samples give equal files.

    Args:
        folder: Where ``shard-000000.tar``, … and ``manifest.json`` go; made if missing.
        samples_per_shard: Size of every shard but the last.
        image_format: ``png`` keeps every pixel; ``jpg`` (quality 95) is smaller for photographs.
        overwrite: Replace the shards that the folder already holds.

    Raises:
        FileExistsError: When the folder already holds shards and ``overwrite`` is false.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        samples_per_shard: int = 1000,
        image_format: Literal["png", "jpg"] = "png",
        overwrite: bool = False,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.image_format = image_format
        self.paths: list[Path] = []
        if (self.folder / PUBLICATION).exists():
            with alone(self.folder, seconds=WAIT):
                recover(self.folder, overwrite=overwrite)
        old = sorted(self.folder.glob("*.tar")) if self.folder.is_dir() else []
        if old and not overwrite:
            raise FileExistsError(
                f"{self.folder} already holds {len(old)} shard(s); pass overwrite=True to replace them"
            )
        self._entries: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._shard: ShardFile | None = None

    def write(self, sample: Sample, files: Sequence[tuple[str, bytes]] | None = None) -> None:
        """Append one sample under its key, or under its number where it has none.

        Args:
            sample: The sample.
            files: Suffix and encoded bytes of every image, ``("jpg", b"…")``, stored as they are in place of
                ``sample.images``, which are encoded anew.

        Raises:
            SampleError: When it would be refused on reading, or its key has a dot or was used before.
        """
        key = sample.key or f"{len(self._keys):08d}"
        try:
            check_messages(sample.messages, len(sample.images if files is None else files))
            if "." in key or key.startswith("__") or key in self._keys:
                raise ValueError("its key is in use or has a dot or '__' in front; expected a new plain name")
        except ValueError as error:
            raise SampleError(f"{self.folder}: sample {key!r}: {error}") from error
        if files is None:
            files = [(self.image_format, encode_image(image, self.image_format)) for image in sample.images]
        if self._shard is None or self._shard.samples == self.samples_per_shard:
            self._next_shard()
        assert self._shard is not None
        try:
            self._shard.add(key, sample, files)
        except RecursionError as error:  # before a byte was written
            raise SampleError(f"{self.folder}: sample {key!r}: a column is nested too deeply; flatten it") from error
        self._keys.add(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._close()
            self.folder.mkdir(parents=True, exist_ok=True)
            entries = [{"name": path.name, **entry} for path, entry in zip(self.paths, self._entries)]
            manifest = {"samples": sum(entry["samples"] for entry in entries), "shards": entries}
            with alone(self.folder, seconds=WAIT):
                publish(self.folder, {_temporary(path).name: path.name for path in self.paths}, manifest)
        except BaseException:
            if not (self.folder / PUBLICATION).exists():  # else the next writer needs them
                self._discard()
            raise

    def _next_shard(self) -> None:
        self._close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.paths.append(self.folder / f"shard-{len(self.paths):06d}.tar")
        self._shard = ShardFile(_temporary(self.paths[-1]))

    def _discard(self) -> None:
        if self._shard is not None:
            self._shard.discard()
        for path in self.paths:
            _temporary(path).unlink(missing_ok=True)

    def _close(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.close())
            self._shard = None


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    image_format: Literal["png", "jpg"] = "png",
    overwrite: bool = False,
    progress: bool = False,
    total: int | None = None,
) -> list[Path]:
    """Write samples into shards of ``folder`` (see :class:`ShardWriter`) and return the shards' paths.

    Args:
        samples: Anything that yields samples; it is read once.
        folder: Where the shards go.
        samples_per_shard: Size of every shard but the last.
        image_format: ``png`` or ``jpg``.
        overwrite: Replace the shards that the folder already holds.
        progress: Show a progress bar.
        total: Number of samples, for the progress bar, where ``samples`` has no length.
    """
    total = len(samples) if total is None and isinstance(samples, Sequence) else total
    with ShardWriter(
        folder, samples_per_shard=samples_per_shard, image_format=image_format, overwrite=overwrite
    ) as writer:
        for sample in tqdm(samples, total=total, unit="sample", desc=f"writing {folder}", disable=not progress):
            writer.write(sample)
    return writer.paths


def encode_image(image: Image.Image, image_format: str) -> bytes:
    """The image as ``png``, or as ``jpg`` of quality 95."""
    buffer = io.BytesIO()
    if image_format == "jpg":
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _temporary(path: Path) -> Path:
    # Two runs may write the same shards on first use; each has its own files, and the last to finish leaves its own.
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
