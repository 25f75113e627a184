"""From runs to a page: what `avar report` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from avar_lightning.run_report.accuracy import accuracy_part
from avar_lightning.run_report.completions import completions_part
from avar_lightning.run_report.courses import compared_part, training_part, vas_part
from avar_lightning.run_report.events import event_files
from avar_lightning.run_report.figures import facts, figures_part
from avar_lightning.run_report.interventions import interventions_part
from avar_lightning.run_report.layers import compared_shares_part, maps_part, shares_part
from avar_lightning.run_report.overlays import overlays_part
from avar_lightning.run_report.page import Section, refuse_existing, write_page
from avar_lightning.run_report.runs import Run, open_run

T = TypeVar("T")
MOST_COLOURS = 7
"""With more runs, those of one folder share a colour."""


@dataclass(frozen=True)
class ReportConfig:
    """What is reported, and where."""

    runs: Sequence[str]
    """Folders of runs, `vas/` folders, single measurements, or folders of sweeps."""
    output: str
    """Folder of the report."""
    title: str = "Visual attention of training runs"
    """Of the page."""
    accuracy: str = "val/accuracy"
    """The metric that VAS is drawn against."""
    each: int = 8
    """Most runs that get a section of their own."""
    overlays: int = 2
    """Most samples of a run whose attention on the image is shown."""
    overwrite: bool = False
    """Replace a report in `output`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be reported."""
        if not self.runs:
            raise ValueError("runs is empty, expected at least one.")
        for name in ("each", "overlays"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 (none) or more.")


def make_report(config: ReportConfig, *, command: str = "") -> Path:
    """Write the page and its pictures.

    Args:
        config: What is reported.
        command: That asked for it, which the page tells.

    Returns:
        The page.

    Raises:
        FileNotFoundError: A run does not exist.
        ValueError: A run is none.
        FileExistsError: `output` holds something else, or a report that may not be overwritten.
    """
    folder = Path(config.output).expanduser().resolve()
    refuse_existing(folder, overwrite=config.overwrite)
    given = {Path(path).expanduser().resolve(): path for path in config.runs}
    runs = [open_run(path) for path in _with_progress(list(given.values()), "reading")]
    name_runs(runs)
    side_by_side = [run for run in runs if run.measured or run.events.scalars or run.summary]
    shown = runs[: config.each]
    alone = [run for run in shown if [run] == side_by_side]
    sections = [] if alone or (shown and not side_by_side) else [_all_runs(side_by_side, config)]
    for number, run in enumerate(_with_progress(shown, "drawing"), start=1):
        sections.append(_one_run(run, f"{number:02}_", config, alone=run in alone))
    if len(shown) < len(runs):
        sections[0].notes.append(
            f"{config.each} of {len(runs)} runs have a section of their own; --each {len(runs)} gives one to all."
        )
    made = f"avar_lightning {version('avar-lightning')}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    return write_page(folder, config.title, sections, command=command, made=made, overwrite=config.overwrite)


def _all_runs(runs: Sequence[Run], config: ReportConfig) -> Section:
    parts = [
        figures_part(runs),
        vas_part(runs),
        accuracy_part(runs, config.accuracy),
        compared_shares_part(runs),
        compared_part(runs),
    ]
    return Section("All runs", "all_", parts=parts)


def _one_run(run: Run, prefix: str, config: ReportConfig, *, alone: bool) -> Section:
    """Everything that is known of a run, and what is said of all where it is alone."""
    section = Section(run.name, prefix, list(facts(run)), list(run.problems))
    parts = section.parts
    parts += [figures_part([run])] if alone else []
    parts += [vas_part([run])] if run.measured else []
    parts += [training_part(run)] if run.events.scalars else []
    if run.measured:
        parts += [maps_part(run), shares_part(run), overlays_part(run, most=config.overlays)]
    parts += [completions_part(run)] if run.completions else []
    parts += [interventions_part(steered, number) for number, steered in enumerate(run.steered)]
    parts += [accuracy_part([run], config.accuracy)] if alone and run.measured else []
    if event_files(run.path) and not run.events.scalars:
        section.notes.append("The event files hold no numbers yet.")
    return section


def name_runs(runs: Sequence[Run]) -> None:
    """Give each run the shortest end of its path that no other run has, and a group that shares its colour."""
    for run in runs:
        parts = _telling_parts(run.path)
        for depth in range(2, len(parts) + 1):
            run.name = "/".join(parts[-depth:])
            if sum(_telling_parts(other.path)[-depth:] == parts[-depth:] for other in runs) == 1:
                break
    for name, count in Counter(run.name for run in runs).items():
        for number, run in enumerate([run for run in runs if run.name == name] if count > 1 else []):
            run.name += f" ({number + 1})"  # a run, and its own vas/ folder
    folders = Counter(run.name.rpartition("/")[0] for run in runs)
    shared = len(runs) > MOST_COLOURS and len(folders) < len(runs)
    for run in runs:
        run.group = run.name.rpartition("/")[0] if shared else run.name


def _telling_parts(path: Path) -> tuple[str, ...]:
    """Of the vas/ folder of a run, the run's."""
    return path.parts[1:-1] if path.name == "vas" else path.parts[1:]


def _with_progress(items: Sequence[T], what: str) -> Iterable[T]:
    return tqdm(items, desc=what, unit="run", leave=False, disable=len(items) < 4)
