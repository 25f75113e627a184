"""From runs to a page: what `avar report` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
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
TITLE = "Visual attention of training runs"
MOST_COLOURS = 7
"""With more runs, those of one folder share a colour."""


def make_report(
    runs: Sequence[str],
    output: str,
    *,
    title: str = TITLE,
    accuracy: str = "val/accuracy",
    each: int = 8,
    overlays: int = 2,
    overwrite: bool = False,
    command: str = "",
) -> Path:
    """Write the page and its pictures.

    Args:
        runs: Folders of runs, `vas/` folders, single measurements, or folders of sweeps.
        output: Folder of the report.
        title: Of the page.
        accuracy: The metric that VAS is drawn against.
        each: Most runs that get a section of their own.
        overlays: Most samples of a run whose attention on the image is shown.
        overwrite: Replace a report in `output`.
        command: That asked for it, which the page tells.

    Returns:
        The page.

    Raises:
        FileNotFoundError: A run does not exist.
        ValueError: A run is none, there is none, or a number is negative.
        FileExistsError: `output` holds something else, or a report that may not be overwritten.
    """
    if not runs:
        raise ValueError("runs is empty, expected at least one.")
    for name, value in (("each", each), ("overlays", overlays)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected 0 (none) or more.")
    folder = Path(output).expanduser().resolve()
    refuse_existing(folder, overwrite=overwrite)
    given = {Path(path).expanduser().resolve(): path for path in runs}
    found = [open_run(path) for path in _with_progress(list(given.values()), "reading")]
    name_runs(found)
    side_by_side = [run for run in found if run.measured or run.events.scalars or run.summary]
    shown = found[:each]
    alone = [run for run in shown if [run] == side_by_side]
    sections = [] if alone or (shown and not side_by_side) else [_all_runs(side_by_side, accuracy)]
    for number, run in enumerate(_with_progress(shown, "drawing"), start=1):
        sections.append(_one_run(run, f"{number:02}_", overlays))
        if run in alone:
            sections[-1].parts.insert(0, figures_part([run]))
            sections[-1].parts += [accuracy_part([run], accuracy)] if run.measured else []
    if len(shown) < len(found):
        told = f"{each} of {len(found)} runs have a section of their own; --each {len(found)} gives one to all."
        sections[0].notes.append(told)
    made = f"avar_lightning {version('avar-lightning')}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    return write_page(folder, title, sections, command=command, made=made, overwrite=overwrite)


def _all_runs(runs: Sequence[Run], accuracy: str) -> Section:
    parts = [figures_part(runs), vas_part(runs), accuracy_part(runs, accuracy)]
    return Section("All runs", "all_", parts=[*parts, compared_shares_part(runs), compared_part(runs)])


def _one_run(run: Run, prefix: str, overlays: int) -> Section:
    section = Section(run.name, prefix, list(facts(run)), list(run.problems))
    parts = section.parts
    parts += [vas_part([run])] if run.measured else []
    parts += [training_part(run)] if run.events.scalars else []
    parts += [maps_part(run), shares_part(run), overlays_part(run, most=overlays)] if run.measured else []
    parts += [completions_part(run)] if run.completions else []
    parts += [interventions_part(steered, place) for place, steered in enumerate(run.steered)]
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
    groups: dict[str, int] = {}
    for run in runs:
        run.group = run.name.rpartition("/")[0] if shared else run.name
        run.style = groups.setdefault(run.group, len(groups))


def _telling_parts(path: Path) -> tuple[str, ...]:
    """Of the vas/ folder of a run, the run's."""
    return path.parts[1:-1] if path.name == "vas" else path.parts[1:]


def _with_progress(items: Sequence[T], what: str) -> Iterable[T]:
    return tqdm(items, desc=what, unit="run", leave=False, disable=len(items) < 4)
