"""One page of HTML with its pictures inside, and the same pictures as files beside it."""

from __future__ import annotations

import base64
import contextlib
import glob
import io
import os
import re
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
MADE_BY = re.compile(r'<meta name="generator" content="avar report" data-pictures="([^"]*)">')
"""By this a page is known for a report, and its pictures for its own; it stands in one of the first lines."""


@dataclass(frozen=True)
class Picture:
    """A picture with its words; `name` is that of its file, without a suffix."""

    name: str
    png: bytes
    alt: str
    caption: str

    @property
    def url(self) -> str:
        """The picture itself as a URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the PNG."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height

    @property
    def wide(self) -> bool:
        """Whether it should have a row of its own."""
        return self.size[0] > 900


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first cell of a row names it."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass
class Part:
    """What stands under one heading of a section."""

    heading: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences, for instance on what is missing."""

    def add(self, name: str, drawn: Figure | bytes, *, alt: str, caption: str) -> None:
        """Add a figure, or a PNG; characters that a file's name should not have become `_`."""
        if not isinstance(drawn, bytes):
            buffer = io.BytesIO()
            canvas: Any = drawn.canvas
            canvas.print_png(buffer)  # draws once, where savefig draws twice
            drawn = buffer.getvalue()
        self.pictures.append(Picture(file_name(name), drawn, alt, caption))


@dataclass
class Section:
    """A chapter of the page: all runs side by side, or one run."""

    title: str
    prefix: str
    """Of the names of its pictures."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def file_name(text: str) -> str:
    """A name that any file system takes.

    >>> file_name("runs/a b/../<x>")
    'runs_a_b_x'
    """
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_")[:100] or "picture"


def write_page(
    folder: Path, title: str, sections: Sequence[Section], *, command: str, made: str, overwrite: bool = False
) -> Path:
    """Write `index.html` and its pictures; the folder has its name when all of it is there.

    Args:
        folder: Where.
        title: Of the page.
        sections: In their order.
        command: That made it.
        made: When, and with what.
        overwrite: Replace the report that is there.

    Returns:
        The page.

    Raises:
        FileExistsError: As `refuse_existing` says.
        OSError: It cannot be written; what was there is there.
    """
    pngs = {
        f"{section.prefix}{picture.name}.png": picture.png
        for section in sections
        for part in section.parts
        for picture in part.pictures
    }
    page = _template().render(title=title, sections=sections, command=command, made=made, pictures=list(pngs))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            new = Path(beside) / "new"
            new.mkdir()
            for name, png in pngs.items():
                (new / name).write_bytes(png)
            (new / PAGE).write_text(page, encoding="utf-8")
            refuse_existing(folder, overwrite=overwrite)  # again: drawing took a while
            _replace(folder, new, Path(f"{beside}.old"))
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}); free space, or choose another folder.") from error
    return folder / PAGE


def _replace(folder: Path, new: Path, old: Path) -> None:
    """Give a folder the name of another; whoever is killed in between leaves the old one for `_put_back`."""
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(old, folder)
        raise
    if old.exists():
        os.rename(old, new)  # into the temporary folder, which goes as a whole


def _put_back(folder: Path) -> None:
    kept = sorted(folder.parent.glob(f".{glob.escape(folder.name)}-????????.old"), key=os.path.getmtime)
    if kept and not folder.exists():
        os.rename(kept[-1], folder)


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """See to it that nothing is lost when a report is written to a folder.

    Raises:
        FileExistsError: It is a file, holds what no report wrote, or holds a report and may not be overwritten.
    """
    _put_back(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    own = _own_files(folder / PAGE)
    if own is None:
        raise FileExistsError(f"{str(folder)!r} exists; it is no report, so give another folder.")
    if foreign := sorted({item.name for item in folder.iterdir()} - own):
        raise FileExistsError(
            f"{str(folder)!r} holds {foreign[0]!r}, which is not of its report; move it away, or give another folder."
        )
    if not overwrite:
        raise FileExistsError(f"{str(folder)!r} exists; pass --overwrite to replace it.")


def _own_files(page: Path) -> set[str] | None:
    """The files of a report, as its page names them; None where it is none."""
    if not page.is_file():
        return None
    with page.open(encoding="utf-8", errors="replace") as file:
        found = MADE_BY.search("".join(islice(file, 10)))
    return {PAGE, *found[1].split()} if found else None


def _template() -> Template:
    text = (files("avar_lightning.run_report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
