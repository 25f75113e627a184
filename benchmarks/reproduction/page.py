"""The page of the findings: each part's measured section, behind what is said of it by hand."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from results import Results
from testing import NUM_SAMPLES

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
        section = f"{part.write(results, output)}\n\n{_circumstances(results, name)}"
        text = _replaced(text, name, section, path)
    path.write_text(text)
    print(path)


def _replaced(text: str, name: str, section: str, path: Path) -> str:
    begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{path} has no lines {begin!r} and {end!r}, expected them around what is measured.")
    return pattern.sub(lambda _: f"{begin}\n\n{section}\n\n{end}", text)


def _circumstances(results: Results, name: str) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "transformers"))
    seeds = ", ".join(map(str, results.seeds))
    return (
        f"*{NUM_SAMPLES} test questions; seeds {seeds}; intervals over seeds are Student's, over questions bootstrap, "
        f"95 %; {device}, {versions}; {date.today()}; `python benchmarks/reproduction {name}`.*"
    )


def seconds_of(folders: Iterable[Path]) -> float:
    """What trainings took, by their own clocks."""
    return sum(json.loads((folder / "summary.json").read_text())["seconds"] for folder in folders)
