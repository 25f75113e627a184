"""One shard on disk: which samples it holds, and any of them without reading the others."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def index_tar(path: str | Path) -> TarIndex:
    """Read the headers of a tar, and group its files into samples as WebDataset does.

    A sample whose last file is cut off is left out, and what comes before is kept.

    Raises:
        ValueError: The file is compressed: no sample can be found in it without reading all before.
    """
    samples: list[tuple[str, dict[str, Span]]] = []
    problem = None
    try:
        with open(path, "rb") as file:
            if _is_compressed(file.read(10)):
                raise ValueError(f"{path} is compressed, expected a plain .tar; decompress it (gunzip, zstd -d) first")
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
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
                    problem = f"its file {member.name} is cut off"
                    break
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if problem is None and tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                problem = "it has no end"
    except (tarfile.TarError, EOFError, OSError) as error:
        problem = str(error) or type(error).__name__
    return TarIndex(samples, problem)


class LocalShard:
    """A shard that lies on a local disk.

    Args:
        path: Of the tar.
        url: What the shard is called in messages.
        expected: Samples that it should hold; those that its headers show when unset.
    """

    def __init__(self, path: str | Path, url: str = "", expected: int | None = None) -> None:
        self.url = url or str(path)
        self.index = index_tar(path)
        # Read by offset and never moved, it can be shared with forked workers; it outlives the removal of its name.
        self._file = None if self.index.problem and not self.index.samples else os.open(path, os.O_RDONLY)
        self.expected = expected

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

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
        assert self._file is not None
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
    shard = LocalShard(path, expected=expected)
    return map(shard.read, range(len(shard)))


def _is_compressed(head: bytes) -> bool:
    """Whether a file begins as gzip, Zstandard, xz or bzip2 do."""
    known = head.startswith((b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ"))
    return known or (head.startswith(b"BZh") and head[4:] == b"1AY&SY")
