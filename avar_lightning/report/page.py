"""One page of HTML with its pictures inside, and the same pictures as files beside it."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
MADE_BY = '<meta name="generator" content="avar report">'
"""By this a page is known for a report, which may be replaced."""


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


@dataclass
class Section:
    """A chapter of the page: all runs side by side, or one run."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def picture(name: str, figure: Figure, *, alt: str, caption: str) -> Picture:
    """A drawn figure as a picture; characters that a file's name should not have become `_`."""
    buffer = io.BytesIO()
    canvas: Any = figure.canvas
    canvas.print_png(buffer)  # draws once, where savefig draws twice
    return Picture(file_name(name), buffer.getvalue(), alt, caption)


def file_name(text: str) -> str:
    """A name that any file system takes.

    >>> file_name("runs/a b/../<x>")
    'runs_a_b_x'
    """
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_")[:100] or "picture"


def write_page(folder: Path, title: str, sections: Iterable[Section], *, command: str, made: str) -> Path:
    """Write `index.html` and its pictures; the folder has its name when all of it is there.

    Args:
        folder: Where; a report that is there now is replaced.
        title: Of the page.
        sections: In their order.
        command: That made it.
        made: When, and with what.

    Returns:
        The page.
    """
    sections = list(sections)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for section in sections:
            for part in section.parts:
                for shown in part.pictures:
                    (unfinished / f"{shown.name}.png").write_bytes(shown.png)
        text = _template().render(title=title, sections=sections, command=command, made=made)
        (unfinished / PAGE).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(unfinished, folder)
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}); free space, or choose another folder.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / PAGE


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """See to it that nothing is lost when a report is written to a folder.

    Raises:
        FileExistsError: It is a file, holds what is no report, or holds a report and may not be overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (_is_report(folder) and overwrite):
        fix = "pass --overwrite to replace it" if _is_report(folder) else "it is no report, so give another folder"
        raise FileExistsError(f"{str(folder)!r} exists; {fix}.")


def _is_report(folder: Path) -> bool:
    page = folder / PAGE
    if not page.is_file() or any(item.name != PAGE and item.suffix != ".png" for item in folder.iterdir()):
        return False
    with page.open(encoding="utf-8", errors="replace") as file:
        return MADE_BY in file.read(2000)


def _template() -> Template:
    text = (files("avar_lightning.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
