"""What all answers come to: figures by benchmark and category with intervals, and the files that say so."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from avar_lightning.benchmarks import BENCHMARKS, Benchmark, benchmark_of
from avar_lightning.evaluation.answers import SCORES
from avar_lightning.evaluation.intervals import Interval, bootstrap, bootstrap_mean
from avar_lightning.evaluation.published import AVERAGE, columns_of, published
from avar_lightning.evaluation.verdicts import JUDGE, NOBODY, RULES
from avar_lightning.files import finite, write_json, write_jsonl, write_text
from avar_lightning.report.benchmarks import benchmarks_table, categories_table, figures_table, plot_benchmarks

VAS_ON = "mathvista"
"""Whose samples the paper measures VAS on, 200 of them."""
Row = Mapping[str, Any]
Results = dict[str, dict[str, Any]]


def evaluate(rows: Sequence[Row]) -> Results:
    """Figures of judged answers, by benchmark in the order of the registry.

    Args:
        rows: Lines of the answers' files, with their verdicts.

    Returns:
        For each benchmark `title`, `num_questions` (of all of it), `num_samples` (that were answered), `num_cut` (that
        did not end by themselves), `extracted_by` (how many by whom), `metrics` and `vas` (name to `Interval`), and
        `categories`: column to value to `num_samples`, `metrics` and `vas`.
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["benchmark"], []).append(row)
    return {name: _evaluate(benchmark_of(name), by_name[name]) for name in BENCHMARKS if name in by_name}


def _evaluate(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Any]:
    categories: dict[str, dict[str, Any]] = {}
    for column in benchmark.categories:
        values: dict[str, list[Row]] = {}
        for row in rows:
            for value in _listed(row["columns"].get(column)):
                values.setdefault(str(value), []).append(row)
        categories[column] = {value: _figures(benchmark, values[value]) for value in sorted(values)}
    by = {who: sum(row["extracted_by"] == who for row in rows) for who in (RULES, JUDGE, NOBODY)}
    known = {"title": benchmark.title, "num_questions": benchmark.questions, "extracted_by": by}
    known |= {"num_cut": sum(not row["finished"] for row in rows)}
    return known | _figures(benchmark, rows) | {"categories": categories}


def _listed(value: Any) -> list[Any]:
    return [] if value in (None, "") else list(value) if isinstance(value, (list, tuple)) else [value]


def _figures(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Any]:
    units = [benchmark.unit(row["columns"]) for row in rows]
    flat = [row["columns"] | {name: row[name] for name in ("response", "extracted", "correct")} for row in rows]
    vas = {name: bootstrap_mean([row[name] for row in rows], units) for name in SCORES}
    return {"num_samples": len(rows), "metrics": bootstrap(flat, units, benchmark.metrics), "vas": vas}


def headline(result: Mapping[str, Any]) -> Interval:
    """The first figure of a benchmark, by which it is known."""
    first: Interval = next(iter(result["metrics"].values()))
    return first


def scalars(results: Results) -> dict[str, float]:
    """Every figure that is defined, as `<benchmark>/<figure>`."""
    figures = {
        f"{name}/{figure}": interval.value
        for name, result in results.items()
        for figure, interval in (result["metrics"] | result["vas"]).items()
    }
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def write_results(
    folder: Path,
    results: Results,
    rows: Sequence[Row],
    *,
    about: Mapping[str, Any],
    judge: Mapping[str, Any] | None = None,
) -> str:
    """Write `samples.jsonl`, `results.json`, `results.csv`, `results.md` and `results.png`.

    Returns:
        The tables, without those of categories.
    """
    known = published()
    own = columns_of({name: headline(result) for name, result in results.items()}, rows)
    partly = {name for name, result in results.items() if result["num_samples"] < result["num_questions"]}
    nobody = {name: result["extracted_by"][NOBODY] for name, result in results.items()}
    columns = {name for name, of in known.parts.items() if partly & set(of)}
    tables = benchmarks_table(
        name="/".join(Path(about["model"]).parts[-2:]),
        columns=known.columns,
        own=own,
        partly=columns | ({AVERAGE} if columns else set()),
        unread={name: sum(nobody.get(part, 0) for part in of) for name, of in known.parts.items()},
        vas=results[VAS_ON]["vas"]["vas"] if VAS_ON in results else None,
        vas_partly=VAS_ON in partly,
        published=known.rows,
        sources=known.sources,
    )
    tables += "\n\n" + figures_table(results)
    write_jsonl(folder / "samples.jsonl", rows)
    write_json(
        folder / "results.json",
        {"about": about, "judge": judge, "benchmarks": _plain(results), "columns_of_the_paper": _plain(own)},
    )
    write_text(folder / "results.csv", _csv(results))
    write_text(folder / "results.md", f"{tables}\n\n{categories_table(results)}".rstrip() + "\n")
    alike = {name for name, of in known.parts.items() if of == (name,)}
    figure = plot_benchmarks(results, comparable=alike, published=known.rows)
    figure.savefig(folder / "results.png", dpi=150)
    return tables


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.plain()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _csv(results: Results) -> str:
    """A line for each figure of each benchmark and category; accuracies in [0, 1]."""
    text = io.StringIO()
    names = ("benchmark", "column", "category", "metric", "value", "low", "high", "num_samples", "num_units")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for name, column, category, part in _parts(results):
        for metric, interval in (part["metrics"] | part["vas"]).items():
            place = {"benchmark": name, "column": column, "category": category, "metric": metric}
            writer.writerow(place | finite(interval.plain()))
    return text.getvalue()


def _parts(results: Results) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    for name, result in results.items():
        yield name, "", "", result
        for column, values in result["categories"].items():
            for value, part in values.items():
                yield name, column, value, part
