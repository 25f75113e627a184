"""The folder in which a conversion is made, from which an interrupted one goes on, and how it becomes a data set.

Chunks are finished one by one in ``DST/.unfinished``: a tar, then a report that says that the tar is whole. When all
are there, they are published (:mod:`avar_lightning.data.publishing`). Every step may be interrupted and done again.
``plan.json`` tells whether a later call wants the same, and goes last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avar_lightning.conversion.rejecting import Rejection, Tally
from avar_lightning.data.publishing import alone, publish, recover
from avar_lightning.data.shards import MANIFEST, UNFINISHED
from avar_lightning.files import json_line, write_json

REJECTED = "rejected.jsonl"
ORIGIN = "origin"  # in the plan: what the manifest says beside its shards
# In the plan, once it is to be published:
_RESULT = "result"  # the manifest
_LEFT_OUT = "left_out"  # the number of records that were left out, which the manifest does not say


class WorkFolder:
    """The unfinished part of the folder of shards ``dst``."""

    def __init__(self, dst: str | Path) -> None:
        self.dst = Path(dst)
        self.folder = self.dst / UNFINISHED
        self._plan = self.folder / "plan.json"
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
            os.close(os.open(self.dst, os.O_RDONLY))
        except OSError as error:
            raise RuntimeError(f"{self.dst} cannot be written ({error}); expected a folder of yours") from error
        with alone(self.dst):
            yield

    def begin(self, plan: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
        """Make the folder, or go on in it where it is of the same plan; a publication is ended, whoever began it.

        Returns:
            The manifest and ``left_out``, where an earlier call of the same plan published all and did not come to say
            so.

        Raises:
            FileExistsError: When dst holds shards and ``overwrite`` is false.
            ValueError: When another conversion was left unfinished there and ``overwrite`` is false.
        """
        recover(self.dst, overwrite=overwrite)
        plan = json.loads(json.dumps(plan))  # as it is read back
        left = json.loads(self._plan.read_text()) if self._plan.is_file() else None
        result = left.pop(_RESULT, None) if left is not None else None
        left_out = left.pop(_LEFT_OUT, 0) if left is not None else 0
        if result is not None and result == self._manifest():
            if left == plan:
                return {**result, "left_out": left_out}
            self.remove()
            left = None
        same = left == plan
        if left is not None and not same and not overwrite:
            others = [name for name in plan if left.get(name) != plan[name]]
            raise ValueError(
                f"{self.folder} holds an unfinished conversion with other {', '.join(others)}; call it again as it "
                "was, or pass --overwrite (overwrite=True) to begin anew"
            )
        old = sorted(self.dst.glob("*.tar"))
        if old and not overwrite:
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
        return None

    def tar(self, number: int) -> Path:
        """Where the samples of a chunk go."""
        return self.folder / f"chunk-{number:06d}.tar"

    def finish(self, number: int, tally: Tally, entry: dict[str, Any] | None, rejections: list[Rejection]) -> None:
        """Say that a chunk is whole; ``entry`` is what the manifest says of its tar, None where it has no sample."""
        rows = [[rejection.index, rejection.row()] for rejection in rejections]
        counts = {"records": tally.records, "left_out": tally.left_out}
        write_json(self._report(number), {**counts, "entry": entry, "rejected": rows})

    def finished(self, number: int) -> Tally | None:
        """The counts of a chunk that is whole, else None."""
        try:
            report = json.loads(self._report(number).read_text())
        except FileNotFoundError:
            return None
        size = report["entry"] and report["entry"]["bytes"]
        if size:
            tar = self.tar(number)
            if not tar.is_file() or tar.stat().st_size != size:
                return None
        tally = Tally(records=report["records"], left_out=report.get("left_out", 0))
        for rejection in _rejections(report):
            tally.reject(rejection)
        return tally

    def judge(self) -> Path:
        """Say that too many are rejected, and return ``rejected.jsonl``, which lists them in the order of the input.

        A later call with --overwrite begins anew; without it the work is kept.
        """
        self._write_rejected()
        os.replace(self.folder / REJECTED, self.dst / REJECTED)
        self._judged.touch()
        return self.dst / REJECTED

    def read_rejected(self) -> Tally:
        """What ``rejected.jsonl`` lists."""
        tally = Tally()
        with (self.dst / REJECTED).open() as file:
            for index, line in enumerate(file):
                tally.reject(Rejection(index, **json.loads(line)))
        return tally

    def publish(self) -> dict[str, Any]:
        """Turn the finished chunks into the data set of dst, replacing what it holds; returns the manifest."""
        moves = {f"{UNFINISHED}/{REJECTED}": REJECTED}
        shards: list[dict[str, Any]] = []
        left_out = 0
        for path, report in self._reports():  # chunks that hold samples get numbers without a gap
            left_out += report.get("left_out", 0)
            if report["entry"]:
                shards.append({"name": f"shard-{len(shards):06d}.tar", **report["entry"]})
                moves[f"{UNFINISHED}/{path.with_suffix('.tar').name}"] = shards[-1]["name"]
        plan = json.loads(self._plan.read_text())
        samples = sum(shard["samples"] for shard in shards)
        manifest = {**plan.get(ORIGIN, {}), "samples": samples, "shards": shards}
        self._write_rejected()
        write_json(self._plan, {**plan, _RESULT: manifest, _LEFT_OUT: left_out})
        publish(self.dst, moves, manifest)
        self.remove()
        return manifest

    def remove(self) -> None:
        """Delete the folder, its plan last: with it, the same call goes on."""
        if not self.folder.exists():
            return
        for path in sorted(self.folder.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self._plan:
                path.unlink()
        self._plan.unlink(missing_ok=True)
        self.folder.rmdir()

    def _manifest(self) -> Any:
        """What dst holds."""
        path = self.dst / MANIFEST
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError:
            return None

    def _write_rejected(self) -> None:
        with (self.folder / REJECTED).open("w") as file:
            for _, report in self._reports():
                file.writelines(json_line(rejection.row()) for rejection in _rejections(report))

    def _report(self, number: int) -> Path:
        return self.tar(number).with_suffix(".json")

    def _reports(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """What the chunks report that are finished, in the order of the input."""
        for path in sorted(self.folder.glob("chunk-*.json"), key=lambda path: int(path.stem.partition("-")[2])):
            yield path, json.loads(path.read_text())


def _rejections(report: Mapping[str, Any]) -> Iterator[Rejection]:
    return (Rejection(index, **row) for index, row in report["rejected"])
