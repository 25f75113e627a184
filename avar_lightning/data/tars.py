"""One shard on disk: which samples it holds, and any of them without reading the others."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import webdataset as wds

from avar_lightning.data.sample import SampleError

Raw = dict[str, Any] | SampleError  # the files of one sample, or why there are none
Span = tuple[int, int]  # offset and size in bytes


@dataclass(frozen=True)
class TarIndex:
    """What the headers of a tar say.

    Attributes:
        samples: Key of each sample and where its files are, by what follows the key, in the order of the tar.
        problem: Why the tar is not whole; None where it is.
    """

    samples: list[tuple[str, dict[str, Span]]]
    problem: str | None = None


def index_tar(source: str | Path | int) -> TarIndex:
    """Read the headers of a tar, and group its files into samples as WebDataset does.

    A sample whose last file is cut off is left out, and what comes before is kept.

    Args:
        source: Path, or the descriptor of the open file.

    Raises:
        ValueError: The file is compressed: no sample can be found in it without reading all before.
        OSError: It cannot be opened or read.
    """
    with open(source if not isinstance(source, int) else os.dup(source), "rb") as file:
        if _is_compressed(file.read(10)):
            raise ValueError(f"{source} is compressed, expected a plain .tar; decompress it (gunzip, zstd -d) first")
        return _index(file, os.fstat(file.fileno()).st_size)


def _index(file: BinaryIO, size: int) -> TarIndex:
    samples: list[tuple[str, dict[str, Span]]] = []
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, suffix = wds.tariterators.base_plus_ext(member.name)
                if not member.isfile() or suffix is None or member.name.startswith("__"):
                    continue
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                # A second file of one name makes the sample bad; its reader says so.
                name = suffix.lower() if suffix.lower() not in samples[-1][1] else f"{suffix.lower()} (again)"
                samples[-1][1][name] = (member.offset_data, member.size)
                if member.offset_data + member.size > size:
                    samples.pop()
                    return TarIndex(samples, f"its file {member.name} is cut off")
            file.seek(tar.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            return TarIndex(samples, None if whole else "it has no end")
    except (tarfile.TarError, EOFError) as error:
        return TarIndex(samples, str(error) or type(error).__name__)


class LocalShard:
    """A shard that lies on a local disk, open.

    It is read by offset, so that it can be shared with forked workers, and it outlives the removal of its name.

    Args:
        source: Path of the tar, or the descriptor of the open file, which is closed with this.
        url: What the shard is called in messages.
        expected: Samples that it should hold; those that its headers show when unset.

    Raises:
        OSError: It cannot be opened or read.
    """

    def __init__(self, source: str | Path | int, url: str = "", expected: int | None = None) -> None:
        self.url, self.expected = url or str(source), expected
        self._file = source if isinstance(source, int) else os.open(source, os.O_RDONLY)
        self.index = index_tar(self._file)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        """Samples that should be here; a tar that is not whole has one more than it shows."""
        return self.expected if self.expected is not None else len(self.index.samples) + bool(self.index.problem)

    def read(self, number: int) -> Raw:
        """The files of one sample, undecoded, as WebDataset hands them out; an error where it is missing."""
        if number >= len(self.index.samples):
            reason = f" ({self.index.problem})" if self.index.problem else ""
            of = "" if self.expected is None else f" of {self.expected}"
            return SampleError(
                f"{self.url}: the shard breaks off after {len(self.index.samples)}{of} sample(s){reason}"
            )
        key, files = self.index.samples[number]
        try:
            contents = {name: self.bytes_of(*span) for name, span in files.items()}
        except OSError as error:
            return SampleError(f"{self.url}: sample {key!r}: {error}")
        return {"__key__": key, "__url__": self.url, **contents}

    def bytes_of(self, offset: int, size: int) -> bytes:
        """Part of the file."""
        found = os.pread(self._file, size, offset)
        while len(found) < size:  # the system may hand over less at a time
            more = os.pread(self._file, size - len(found), offset + len(found))
            if not more:
                raise OSError(f"the file ends {size - len(found)} bytes too early; it was changed while it was read")
            found += more
        return found


def read_shard(path: str | Path, expected: int | None = None) -> Iterator[Raw]:
    """All samples of a shard, undecoded, in the order of the tar.

    A `SampleError` stands for every sample that a missing, cut or damaged tar should have had.
    """
    try:
        shard = LocalShard(path, expected=expected)
    except FileNotFoundError as error:
        return iter([SampleError(f"{path}: {error.strerror}")] * (expected or 1))
    return map(shard.read, range(len(shard)))


def _is_compressed(head: bytes) -> bool:
    """Whether a file begins as gzip, Zstandard, xz or bzip2 do."""
    known = head.startswith((b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ"))
    return known or (head.startswith(b"BZh") and head[4:] == b"1AY&SY")
