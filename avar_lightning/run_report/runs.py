"""What a run wrote, read back: measurements of VAS, events, configuration, summary, completions, interventions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from avar_lightning.run_report.events import Events, event_files, read_events
from avar_lightning.run_report.interventions import SWEEP, Steered, read_interventions, read_sweep
from avar_lightning.run_report.measurements import Measured, by_step, mapping, number, read_measured

EXPECTED = (
    "expected the folder of a run (with vas/, summary.json, interventions/, completions/ or TensorBoard's events), "
    "a vas/ folder, one vas/step_*.json, or the folder of an avar sweep"
)


@dataclass(eq=False)
class Run:
    """All that is known of one RUN; what is missing is empty, and said in `problems`."""

    path: Path
    given: str
    name: str = ""
    group: str = ""
    style: int = 0
    """Number of the group, by which it gets colour, marker and line."""
    measured: list[Measured] = field(default_factory=list)
    """In the order of their steps; the first and the last with maps."""
    events: Events = field(default_factory=Events)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    completions: list[tuple[Path, list[dict[str, Any]]]] = field(default_factory=list)
    steered: list[Steered] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def first_and_last(self) -> list[Measured]:
        """The first measurement and the last; one where there is only one."""
        return self.measured[:1] + self.measured[1:][-1:]

    @property
    def trained(self) -> list[Measured]:
        """What was measured in training or after it."""
        return [measured for measured in self.measured if not measured.baseline]

    def ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics before training and after it: of the summary, and over them those of the measurements."""
        before, after = (
            {k: number(v) for k, v in mapping(self.summary.get(end)).items()} for end in ("before", "after")
        )
        for measured in self.measured[:1]:
            before |= measured.metrics if measured.baseline else {}
        for measured in self.trained[-1:]:
            after |= measured.metrics
        return before, after


def open_run(path: str | Path) -> Run:
    """Read a run's folder, a vas/ folder, one step's JSON or a sweep's folder.

    What is missing or broken is named in the run's `problems`; the rest is there.

    Raises:
        FileNotFoundError: Nothing has this name.
        ValueError: It is none of these.
    """
    given, path = str(path), Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist, {EXPECTED}.")
    run = Run(path.resolve(), given)
    if path.is_file():
        try:
            run.measured = [read_measured(path)]
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no measurement of VASCallback ({error}), {EXPECTED}.") from error
    elif (path / SWEEP).is_file():
        with _noting(run):
            run.steered = [read_sweep(path)]
    elif steps := list(path.glob("step_*.json")):
        _read_measured(run, steps)
    elif _is_run(path):
        _read_run(run)
    else:
        inside = sorted(child.name for child in path.iterdir() if child.is_dir() and _is_run(child))
        fix = f"; it holds the runs {', '.join(inside[:4])}: name them" if inside else ""
        raise ValueError(f"{str(path)!r} is no run, {EXPECTED}{fix}.")
    return run


def _is_run(folder: Path) -> bool:
    parts = ("vas", "interventions", "completions", "summary.json")
    return any((folder / part).exists() for part in parts) or bool(event_files(folder))


def _read_run(run: Run) -> None:
    folder = run.path
    run.events = read_events(folder)
    run.problems += run.events.problems
    run.config, run.summary = _read_mapping(run, "config.yaml"), _read_mapping(run, "summary.json")
    steps = list((folder / "vas").glob("step_*.json"))
    if not steps:
        run.problems.append("vas/ holds no step_*.json: VASCallback did not measure, or the run ended before it could.")
    _read_measured(run, steps)
    if not run.summary:
        run.problems.append("There is no summary.json: the run was interrupted, or not started by train.py.")
    completions = by_step((folder / "completions").glob("step_*.jsonl"))
    run.completions = [(path, _read_lines(run, path)) for path in completions[:1] + completions[1:][-1:]]
    stages = by_step((folder / "interventions").glob("*_step_*.json"))
    for path in {path.name.partition("_step_")[0]: path for path in stages}.values():
        with _noting(run):
            run.steered.append(read_interventions(path))


def _read_measured(run: Run, paths: Sequence[Path]) -> None:
    for path in by_step(paths):
        with _noting(run):
            run.measured.append(read_measured(path, maps=False))
    run.measured.sort(key=lambda measured: (measured.step, not measured.baseline))
    for end in {0, len(run.measured) - 1} if run.measured else ():
        with _noting(run):
            run.measured[end] = read_measured(run.measured[end].path)


def _read_mapping(run: Run, name: str) -> dict[str, Any]:
    path = run.path / name
    if not path.is_file():
        return {}
    try:
        return mapping(json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"{name} cannot be read ({type(error).__name__}).")
        return {}


def _read_lines(run: Run, path: Path) -> list[dict[str, Any]]:
    rows = []
    lines = path.read_text(errors="replace").rstrip("\n").split("\n")  # completions may hold other line ends
    for place, line in enumerate(lines, start=1):
        try:
            rows.append(mapping(json.loads(line)))
        except ValueError:
            run.problems.append(f"completions/{path.name} breaks off in line {place}; the lines before are shown.")
            break
    return [row for row in rows if row]


@contextmanager
def _noting(run: Run) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        run.problems.append(str(error))
