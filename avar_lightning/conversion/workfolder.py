"""The folder in which a conversion is made, from which an interrupted one goes on, and how it becomes a data set.

Chunks are finished one by one in ``DST/.unfinished``: a tar, then a report that says that the tar is whole. When all
are there, ``publish.json`` says which becomes which shard, the tars are renamed into DST, and ``manifest.json`` comes
last. Every step may be interrupted and done again. ``plan.json`` tells whether a later call wants the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avar_lightning.conversion.rejecting import Rejection, Tally
from avar_lightning.data.shards import MANIFEST, PUBLICATION, UNFINISHED
from avar_lightning.files import json_line, write_json

REJECTED = "rejected.jsonl"


class WorkFolder:
    """The unfinished part of the folder of shards ``dst``."""

    def __init__(self, dst: str | Path) -> None:
        self.dst = Path(dst)
        self.folder = self.dst / UNFINISHED
        self._plan = self.folder / "plan.json"
        self._publication = self.dst / PUBLICATION
        self._judged = self.folder / "judged"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other conversions out of dst for the length of a block; the system forgets it when a process dies.

        Raises:
            RuntimeError: When another one is at work there, or dst cannot be made.
        """
        if self.dst.exists() and not self.dst.is_dir():
            raise FileExistsError(f"{self.dst} is a file; expected a folder for the shards, or a new name")
        try:
            self.dst.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.dst, os.O_RDONLY)
        except OSError as error:
            raise RuntimeError(f"{self.dst} cannot be written ({error}); expected a folder of yours") from error
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process converts into {self.dst}; wait for it, or give another folder"
            ) from error
        finally:
            os.close(folder)

    def begin(self, plan: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder, or go on in it where it is of the same plan.

        Raises:
            FileExistsError: When dst holds shards and ``overwrite`` is false.
            ValueError: When another conversion was left unfinished there and ``overwrite`` is false.
        """
        plan = json.loads(json.dumps(plan))  # as it is read back
        left = json.loads(self._plan.read_text()) if self._plan.is_file() else None
        same = left == plan
        if left is not None and not same and not overwrite:
            others = [name for name in plan if left.get(name) != plan[name]]
            raise ValueError(
                f"{self.folder} holds an unfinished conversion with other {', '.join(others)}; call it again as it "
                "was, or pass --overwrite (overwrite=True) to begin anew"
            )
        old = sorted(self.dst.glob("*.tar"))
        if old and not overwrite and not (same and self._publication.exists()):
            raise FileExistsError(
                f"{self.dst} already holds {len(old)} shard(s); pass --overwrite (overwrite=True) to replace them, or "
                "another folder"
            )
        if not same or (overwrite and self._judged.exists()):
            self.remove()
        self._judged.unlink(missing_ok=True)
        try:
            write_json(self._plan, plan)
        except OSError as error:
            raise RuntimeError(f"{self.dst} cannot be written ({error}); expected a folder of yours") from error

    def tar(self, number: int) -> Path:
        """Where the samples of a chunk go."""
        return self.folder / f"chunk-{number:06d}.tar"

    def finish(self, number: int, tally: Tally, entry: dict[str, Any] | None, rejections: list[Rejection]) -> None:
        """Say that a chunk is whole; ``entry`` is what the manifest says of its tar, None where it has no sample."""
        rows = [[rejection.index, rejection.row()] for rejection in rejections]
        write_json(self._report(number), {"records": tally.records, "entry": entry, "rejected": rows})

    def finished(self, number: int) -> Tally | None:
        """The counts of a chunk that is whole, else None."""
        try:
            report = json.loads(self._report(number).read_text())
        except FileNotFoundError:
            return None
        size = report["entry"] and report["entry"]["bytes"]
        if size and not self._publication.exists():
            tar = self.tar(number)
            if not tar.is_file() or tar.stat().st_size != size:
                return None
        tally = Tally(records=report["records"])
        for rejection in _rejections(report):
            tally.reject(rejection)
        return tally

    def write_rejected(self) -> Path:
        """Write ``rejected.jsonl``, in the order of the input, and return its path."""
        path = self.dst / REJECTED
        with (unfinished := self.folder / REJECTED).open("w") as file:
            for _, report in self._reports():
                file.writelines(json_line(rejection.row()) for rejection in _rejections(report))
        os.replace(unfinished, path)
        return path

    def judge(self) -> None:
        """Note that the work ended with too many rejections: --overwrite begins anew, without it the work is kept."""
        self._judged.touch()

    def publish(self) -> dict[str, Any]:
        """Turn the finished chunks into the data set of dst, replacing what it holds; returns the manifest."""
        if not self._publication.exists():
            write_json(self._publication, self._moves())
        publication = json.loads(self._publication.read_text())
        manifest = publication["manifest"]
        pairs = zip(publication["chunks"], manifest["shards"])
        moves = {self.folder / chunk: self.dst / shard["name"] for chunk, shard in pairs}
        (self.dst / MANIFEST).unlink(missing_ok=True)
        moved = {shard for chunk, shard in moves.items() if not chunk.exists()}
        for path in self.dst.glob("*.tar"):
            if path not in moved:
                path.unlink()
        for chunk, shard in moves.items():
            if chunk.exists():
                chunk.replace(shard)
        self.write_rejected()
        write_json(self.dst / MANIFEST, manifest)
        self.remove()
        return manifest

    def remove(self) -> None:
        """Delete the folder; without its plan, what an interruption leaves of it counts for nothing."""
        self._plan.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _moves(self) -> dict[str, Any]:
        """Chunks that hold samples become shards with numbers without a gap."""
        chunks: list[str] = []
        shards: list[dict[str, Any]] = []
        for path, report in self._reports():
            if report["entry"]:
                chunks.append(path.with_suffix(".tar").name)
                shards.append({"name": f"shard-{len(shards):06d}.tar", **report["entry"]})
        total = sum(shard["samples"] for shard in shards)
        return {"chunks": chunks, "manifest": {"samples": total, "shards": shards}}

    def _report(self, number: int) -> Path:
        return self.tar(number).with_suffix(".json")

    def _reports(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """What the chunks report that are finished, in the order of the input."""
        for path in sorted(self.folder.glob("chunk-*.json"), key=lambda path: int(path.stem.partition("-")[2])):
            yield path, json.loads(path.read_text())


def _rejections(report: Mapping[str, Any]) -> Iterator[Rejection]:
    return (Rejection(index, **row) for index, row in report["rejected"])
