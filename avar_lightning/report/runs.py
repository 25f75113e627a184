"""What a run wrote, read back: measurements of VAS, events, configuration, summary, completions, interventions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from avar_lightning.report.events import Events, event_files, read_events
from avar_lightning.report.steered import SWEEP, Steered, number, read_interventions, read_sweep

QUERIES = ("user", "response")
REDUCTIONS = ("mean_of_ratios", "ratio_of_means", "share", "median")
EXPECTED = (
    "expected the folder of a run (with vas/, summary.json, interventions/, completions/ or TensorBoard's events), "
    "a vas/ folder, one vas/step_*.json, or the folder of an avar sweep"
)
SAMPLES = '\n "samples": ['
"""Where the rows of samples begin in a file of VASCallback; what a report shows of every step stands before."""


@dataclass(frozen=True)
class Measured:
    """One file of VASCallback.

    Attributes:
        path: The file.
        step: Of the training.
        baseline: Whether it was measured before training.
        metrics: Every `val/*` metric.
        scores: By query set and reduction.
        layers: Number of each layer.
        maps: By query set (L, H), for the first and the last measurement of a run; empty for others.
        shares: By query set and role (L,), likewise.
    """

    path: Path
    step: int
    baseline: bool
    metrics: dict[str, float]
    scores: dict[str, dict[str, float]]
    layers: list[int]
    model: str = ""
    num_samples: int = 0
    maps: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    shares: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)


@dataclass
class Run:
    """All that is known of one RUN; what is missing is empty, and said in `problems`."""

    path: Path
    given: str
    name: str = ""
    group: str = ""
    measured: list[Measured] = field(default_factory=list)
    events: Events = field(default_factory=Events)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    completions: list[tuple[Path, list[dict[str, Any]]]] = field(default_factory=list)
    steered: list[Steered] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def first_and_last(self) -> list[Measured]:
        """The baseline, or else the first measurement, and the last; one where there is only one."""
        return self.measured[:1] + self.measured[1:][-1:]

    def ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics before and after: of the summary, and over them those of the measurements."""
        before, after = (
            {k: number(v) for k, v in _mapping(self.summary.get(end)).items()} for end in ("before", "after")
        )
        if len(self.measured) > 1 or (self.measured and self.measured[0].baseline):
            before |= self.measured[0].metrics
        if self.measured and not self.measured[-1].baseline:
            after |= self.measured[-1].metrics
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
    if path.is_file():
        return Run(path.resolve(), given, measured=[_whole(path)])
    run = Run(path.resolve(), given)
    if (path / SWEEP).is_file():
        _try(run, lambda: run.steered.append(read_sweep(path)))
    elif steps := _steps(path):
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
    steps = _steps(folder / "vas")
    if not steps:
        run.problems.append("vas/ holds no step_*.json: VASCallback did not measure, or the run ended before it could.")
    _read_measured(run, steps)
    if not run.summary:
        run.problems.append("There is no summary.json: the run was interrupted, or not started by train.py.")
    completions = sorted((folder / "completions").glob("step_*.jsonl"))
    run.completions = [(path, _read_lines(run, path)) for path in completions[:1] + completions[1:][-1:]]
    newest = {
        path.name.partition("_step_")[0]: path for path in sorted((folder / "interventions").glob("*_step_*.json"))
    }
    for path in newest.values():
        _try(run, lambda path=path: run.steered.append(read_interventions(path)))


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.json"))


def _read_measured(run: Run, paths: Sequence[Path]) -> None:
    for number_, path in enumerate(paths):
        whole = number_ in (0, len(paths) - 1)
        _try(run, lambda path=path, whole=whole: run.measured.append(read_measured(path, maps=whole)))
    run.measured.sort(key=lambda measured: (measured.step, not measured.baseline))
    if run.measured and not run.measured[-1].maps:  # the last file was broken, so that another is the last one
        _try(run, lambda: run.measured.append(read_measured(run.measured.pop().path)))


def _whole(path: Path) -> Measured:
    try:
        return read_measured(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no measurement of VASCallback ({error}), {EXPECTED}.") from error


def read_measured(path: Path, *, maps: bool = True) -> Measured:
    """Read one file of VASCallback up to the rows of its samples.

    Args:
        path: The file.
        maps: Keep maps and shares by layer, too.

    Raises:
        ValueError: It is no such file, or broken off.
    """
    try:
        found = _head(path)
        own = {query: found[query] for query in QUERIES if found.get(query)}
        if not own:
            raise KeyError("user or response")
        layers = [int(layer) for layer in found["layers"]]
        return Measured(
            path,
            step=int(found["step"]),
            baseline=bool(found.get("baseline")),
            metrics={str(name): number(value) for name, value in _mapping(found.get("metrics")).items()},
            scores={query: {name: number(of.get(name)) for name in REDUCTIONS} for query, of in own.items()},
            layers=layers,
            model=str(found.get("model", "")),
            num_samples=int(found.get("num_samples", 0)),
            maps={query: _array(of["map"], 2, len(layers)) for query, of in own.items() if maps and of.get("map")},
            shares={
                query: {role: _array(share, 1, len(layers)) for role, share in of["attention_shares"].items()}
                for query, of in own.items()
                if maps and {"system", "user", "image"} <= set(of.get("attention_shares") or ())
            },
        )
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path.name} cannot be read: {what}") from error


def read_overlays(measured: Measured) -> dict[str, NDArray[np.float64]]:
    """The attention on image tokens (rows, columns) by the id of its sample; for this the whole file is read."""
    found = json.loads(measured.path.read_text()).get("overlays") or []
    return {str(overlay["id"]): _array(overlay["grid"], 2, None) for overlay in found if overlay.get("id") is not None}


def _head(path: Path) -> dict[str, Any]:
    text = ""
    with path.open() as file:
        while chunk := file.read(1 << 17):
            before = max(0, len(text) - len(SAMPLES))
            text += chunk
            if (end := text.find(SAMPLES, before)) >= 0:
                text = text[:end].rstrip().removesuffix(",") + "}"
                break
    found = json.loads(text)
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, found {type(found).__name__}")
    return found


def _array(values: Any, dimensions: int, rows: int | None) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)  # None, for undefined, becomes NaN
    if array.ndim != dimensions or rows not in (None, len(array)):
        raise ValueError(f"an array has shape {array.shape}, expected {dimensions} dimensions of {rows} rows")
    return array


def _read_mapping(run: Run, name: str) -> dict[str, Any]:
    path = run.path / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"{name} cannot be read ({type(error).__name__}).")
        return {}
    return _mapping(found)


def _read_lines(run: Run, path: Path) -> list[dict[str, Any]]:
    rows = []
    for place, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            rows.append(_mapping(json.loads(line)))
        except ValueError:
            run.problems.append(f"completions/{path.name} breaks off in line {place}; the lines before are shown.")
            break
    return [row for row in rows if row]


def _try(run: Run, read: Any) -> None:
    try:
        read()
    except ValueError as error:
        run.problems.append(str(error))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
