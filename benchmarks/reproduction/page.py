"""The page of the findings: what is measured goes between marks, among what is said of it by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import ModuleType

from avar_lightning.files import write_text
from benchmarks.reproduction.results import Results

PAGE, PICTURES = "reproduction.md", Path("results") / "reproduction"


def write(results: Results, parts: Mapping[str, ModuleType], docs: Path) -> None:
    """Replace what stands between the marks of each part in docs/reproduction.md.

    Raises:
        ValueError: The page has no marks for a part.
    """
    output = docs / PICTURES
    output.mkdir(parents=True, exist_ok=True)
    path = docs / PAGE
    text = path.read_text()
    for name, part in parts.items():
        measured = results.finished(part.NEEDS)
        section = part.write(results, output) if measured else "Nothing is finished yet."
        text = replaced(text, name, f"{section}\n\n{_circumstances(results, name, part)}", path)
    write_text(path, text)
    print(path)


def replaced(text: str, name: str, section: str, path: Path) -> str:
    """The page with another section between a part's marks."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{path} has no lines {begin!r} and {end!r}, expected them around what is measured.")
    return pattern.sub(lambda _: f"{begin}\n\n{section}\n\n{end}", text)


def _circumstances(results: Results, name: str, part: ModuleType) -> str:
    """On what it was measured, as the measurements themselves say."""
    found = [each for model in part.NEEDS for each in results.of(model).values()]
    devices = ", ".join(sorted({each["device"] for each in found})) or "–"
    versions = sorted({f"{name} {number}" for each in found for name, number in each["versions"].items()})
    questions = ", ".join(sorted({str(each["num_samples"]) for each in found}))
    seeds = ", ".join(map(str, results.seeds))
    return (
        f"*{questions} test questions; seeds {seeds} where finished; {devices}; {', '.join(versions)}; "
        f"{date.today()}; `python -m benchmarks.reproduction {name}`.*"
    )
