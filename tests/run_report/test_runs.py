"""Runs are read as they were written, in every shape that a RUN may have; what is broken is named."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from avar_lightning.run_report.figures import figures_part
from avar_lightning.run_report.interventions import read_interventions
from avar_lightning.run_report.layers import compared_shares_part
from avar_lightning.run_report.measurements import SAMPLES, read_grids, read_measured
from avar_lightning.run_report.runs import open_run
from tests.run_report.written_runs import measurement, write_events, write_measurements

SWEEP = Path(__file__).parents[2] / "docs/results/sweep.csv"


def test_a_measurement_is_read_with_null_for_undefined(tmp_path: Path) -> None:
    one = measurement(7, vas=3.0)
    one["user"]["map"][1][0] = math.nan
    one["metrics"]["val/vas"] = math.nan
    write_measurements(tmp_path, one)
    found = read_measured(tmp_path / "vas/step_00000007.json")
    assert (found.step, found.baseline, found.layers) == (7, False, [0, 1])
    assert found.scores["response"]["ratio_of_means"] == 6.0
    assert math.isnan(found.metrics["val/vas"])
    np.testing.assert_equal(found.maps["user"], [[3.0, 3.0], [math.nan, 3.0]])
    np.testing.assert_allclose(found.shares["user"]["image"], [0.375, 0.375])
    ((identifier, grid),) = read_grids(found)
    assert identifier == "a"
    np.testing.assert_equal(grid, [[1, 2], [3, 4]])


@pytest.mark.parametrize("before", [0, 40_000, (1 << 17) - 60, 300_000])
def test_of_a_large_file_only_the_head_is_parsed(tmp_path: Path, before: int) -> None:
    """The rows of samples are no JSON here; wherever they begin in the file, the head is found."""
    one = measurement(1) | {"model": "m" * before}
    write_measurements(tmp_path, one)
    path = tmp_path / "vas/step_00000001.json"
    head, mark, _ = path.read_text().partition(SAMPLES)
    path.write_text(head + mark + "no JSON " * 100_000)
    assert read_measured(path).scores["user"]["share"] == pytest.approx(2 / 3)


def test_a_file_of_another_layout_is_parsed_whole(tmp_path: Path) -> None:
    (tmp_path / "step_1.json").write_text(json.dumps(measurement(1)))
    assert read_measured(tmp_path / "step_1.json").step == 1


def test_a_run_in_each_of_its_shapes(tmp_path: Path) -> None:
    folder = write_measurements(tmp_path / "name/version_0", measurement(0), measurement(10), measurement(20, vas=5.0))
    for path in (folder, folder / "vas"):
        run = open_run(path)
        assert [measured.step for measured in run.measured] == [0, 10, 20]
        assert [bool(measured.maps) for measured in run.measured] == [True, False, True], "only the ends are shown"
        assert [measured.step for measured in run.first_and_last] == [0, 20]
    assert [m.step for m in open_run(folder / "vas/step_00000010.json").measured] == [10]
    assert "VASCallback did not measure" not in " ".join(open_run(folder).problems)


def test_first_and_last_figures_are_those_of_summary_and_measurements(tmp_path: Path) -> None:
    write_measurements(tmp_path, measurement(0, accuracy=0.25), measurement(9, accuracy=0.75))
    summary = {"before": {"val/accuracy": 0.1, "reward/total": 1.0}, "after": {"reward/total": 2.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    before, after = open_run(tmp_path).ends()
    assert (before["val/accuracy"], before["reward/total"]) == (0.25, 1.0)
    assert (after["val/accuracy"], after["reward/total"]) == (0.75, 2.0)


@pytest.mark.parametrize(
    ("steps", "steps_told", "accuracy"),
    [
        ((0, 100, 300), "0 → 300", "10.0 → 30.0"),
        ((100, 200, 300), "100 → 300", "10.0 (step 100) → 30.0"),
        ((300,), "300", "– → 10.0"),
        ((0,), "0", "10.0 → –"),
    ],
)
def test_only_a_baseline_is_before_training_and_never_after_it(
    tmp_path: Path, steps: tuple[int, ...], steps_told: str, accuracy: str
) -> None:
    write_measurements(tmp_path, *(measurement(step, accuracy=0.1 * n) for n, step in enumerate(steps, start=1)))
    (table,) = figures_part([open_run(tmp_path / "vas")]).tables
    assert table.headings[:3] == ["run", "steps", "Accuracy (%)"]
    assert table.rows[0][1:3] == [steps_told, accuracy]


def test_attention_after_training_leaves_out_what_was_measured_before_it_only(tmp_path: Path) -> None:
    write_measurements(tmp_path / "untrained", measurement(0))
    run = open_run(tmp_path / "untrained/vas")
    run.name = "untrained"
    part = compared_shares_part([run])
    assert part.pictures == []
    assert part.notes[0] == "Measured before training only, and left out here: untrained."


def test_steps_follow_as_numbers_and_not_as_letters(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"step_{step}.json").write_text(json.dumps(measurement(step)))
    run = open_run(tmp_path)
    assert [(m.step, bool(m.maps)) for m in run.measured] == [(2, True), (9, False), (10, True)]


def test_what_is_broken_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    write_measurements(tmp_path, measurement(0), measurement(5), measurement(9))
    last = tmp_path / "vas/step_00000009.json"
    last.write_text(last.read_text()[:120])
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions/step_00000001.jsonl").write_text('{"prompt": 0, "completion": "x"}\n{"prompt": 0, "compl')
    (tmp_path / "interventions").mkdir()
    (tmp_path / "interventions/val_step_00000009.json").write_text('{"settings": {"unsteered"')
    write_events(tmp_path, {"train/loss": [1.0]})
    run = open_run(tmp_path)
    assert [measured.step for measured in run.measured] == [0, 5]
    assert run.measured[-1].maps, "the last whole measurement takes the place of the broken one"
    assert run.completions[0][1] == [{"prompt": 0, "completion": "x"}]
    assert run.events.scalars == {"train/loss": {0: 1.0}}
    said = "\n".join(run.problems)
    for name in ("step_00000009.json", "summary.json", "config.yaml", "in line 2", "val_step_00000009.json"):
        assert name in said


@pytest.mark.parametrize(
    "wrong",
    [
        "[]",
        "{}",
        '{"step": 1, "layers": [], "user": 3}',
        '{"step": 1, "layers": [0], "user": {"map": [1, 2]}}',
        '{"step": 1, "layers": [0, 1], "user": {"map": [[1, 2]]}}',
        "\x00",
    ],
)
def test_what_is_no_measurement_is_a_sentence(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "step_1.json").write_text(wrong)
    with pytest.raises(ValueError, match=r"is no measurement of VASCallback .*expected the folder of a run"):
        open_run(tmp_path / "step_1.json")


def test_what_is_no_run_is_a_sentence_that_names_the_runs_inside(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing' does not exist, expected the folder of a run"):
        open_run(tmp_path / "nothing")
    write_measurements(tmp_path / "version_3", measurement(1))
    with pytest.raises(ValueError, match=r"is no run, expected .*; it holds the runs version_3: name them"):
        open_run(tmp_path)


def test_a_sweep_is_read_as_avar_sweep_wrote_it(tmp_path: Path) -> None:
    """docs/results/sweep.csv is a table of the command."""
    (tmp_path / "sweep.json").write_text("{}")
    (steering,) = [*open_run(tmp_path).steered, None]
    assert steering is None
    assert "the sweep has not ended" in open_run(tmp_path).problems[0]
    shutil.copy(SWEEP, tmp_path / "results.csv")
    (steering,) = open_run(tmp_path).steered
    with SWEEP.open() as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    assert list(steering.results) == list(rows)
    for name, row in rows.items():
        change = steering.results[name]["accuracy_difference"]
        assert change.low == float(row["accuracy_low"])
        assert str(change.significant) == row["accuracy_significant"]
    assert len(steering.grid) == len(rows) - 1, "all but unsteered"
    assert {row["mode"] for row in steering.grid} == {"logit", "mass"}


def test_an_ablation_is_no_grid(tmp_path: Path) -> None:
    def setting(of: object) -> dict:
        return {
            "intervention": of,
            "accuracy": 0.5,
            "accuracy_difference": 0.1,
            "accuracy_low": 0.05,
            "accuracy_high": None,
        }

    same = {"mode": "logit", "image": 0.1, "system": 0.2}
    settings = {"unsteered": setting(None)} | {f"without layer {n}": setting(same) for n in range(3)}
    (tmp_path / "x.json").write_text(json.dumps({"settings": settings}))
    found = read_interventions(tmp_path / "x.json")
    assert found.grid == []
    assert math.isnan(found.results["without layer 1"]["accuracy_difference"].high)
    assert math.isnan(found.results["without layer 1"]["vas_ratio_of_means"])
