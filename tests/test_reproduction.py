import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from avar_lightning.cli import AvarCLI, command_line
from avar_lightning.data.demo import TASKS
from benchmarks.reproduction import ablation, beyond, lazy, page, recipes, relation, steering, world
from benchmarks.reproduction.differences import crossed, holm, marked, over_seeds
from benchmarks.reproduction.results import ACCURACY, VAS, Results
from benchmarks.reproduction.testing import _others, answers_path, result_path
from benchmarks.reproduction.training import command_of, train_all

TRAININGS = list(dict.fromkeys(
    model for part in (world, relation, lazy, steering, ablation, beyond) for model in part.NEEDS
    if isinstance(model, recipes.Training)
))  # fmt: skip


def test_an_interval_over_seeds_is_students():
    found = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5 / 5)  # by hand: variance 2.5, t of four degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert found.significant
    assert not over_seeds([-1.0, 0.0, 1.5]).significant
    assert f"{over_seeds([1.0]):+.1f}" == "+1.0"
    assert f"{found.scaled(10):+.0f}" == "+30 (+10 to +50)"
    with pytest.raises(ValueError, match="11 seeds"):
        over_seeds([0.0] * 11)


def test_the_crossed_bootstrap_draws_seeds_and_questions():
    # Of two seeds and two questions there are 4 × 4 equally likely resamples, which can be written down.
    change = np.array([[0.0, 1.0], [1.0, 3.0]])
    resamples = sorted(
        change[np.ix_(seeds, questions)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for questions in itertools.product(range(2), repeat=2)
    )
    found = crossed(np.zeros((2, 2)), change)
    assert (found.mean, found.n) == (1.25, 2)
    assert (found.low, found.high) == (resamples[0], resamples[-1])  # each has 1 of 16 resamples, which is over 2.5 %
    assert found.p == pytest.approx(2 / 16, abs=0.02)  # only the smallest is not above 0
    one = crossed([[0, 0, 0, 0]], [[1, 1, 1, 0]])
    assert (one.mean, one.low, one.high) == (0.75, 0.25, 1.0)
    assert crossed([[0, 1]], [[0, 1]]).p == 1.0


def test_stars_are_given_by_family():
    assert holm([0.012, 0.02, 0.04, 0.9]) == [True, False, False, False]  # 0.05 / 4, then 0.05 / 3
    assert holm([0.01, math.nan, 0.04, 0.02]) == [True, False, True, True]
    sure, unsure = (dataclasses.replace(crossed([[0, 0]], [[1, 1]]), p=p) for p in (0.001, 0.03))
    assert marked([None, sure, unsure, unsure], "+.0f") == ["", "+100 (+100 to +100) *", *["+100 (+100 to +100)"] * 2]
    assert marked([unsure], "+.0f") == ["+100 (+100 to +100) *"]


def test_another_recipe_or_start_has_another_folder(tmp_path):
    def changed(**fields):
        return dataclasses.replace(recipes.HINGE_T, **fields).folder(tmp_path, 0)

    plain = recipes.HINGE_T.folder(tmp_path, 0)
    assert changed() == plain
    others = {changed(options=(*recipes.HINGE_T.options, "--x=1")), changed(start="demo_sft")}
    others |= {changed(start=recipes.ANCHORED), changed(config=recipes.GRPO), recipes.HINGE_T.folder(tmp_path, 1)}
    assert len(others | {plain}) == 6
    after = dataclasses.replace(recipes.GUIDED_VARS, start=dataclasses.replace(recipes.HINGE_T, options=()))
    assert after.folder(tmp_path, 0) != recipes.GUIDED_VARS.folder(tmp_path, 0)


def test_names_and_titles_belong_to_one_training_each():
    assert len({each.name for each in TRAININGS}) == len({each.title for each in TRAININGS}) == len(TRAININGS)
    assert len(relation.NEEDS) >= 12


class Parsed(AvarCLI):
    """What a command line says, and nothing of it built."""

    def instantiate_classes(self):
        """Not needed."""

    def _run_subcommand(self, subcommand):
        """Nor run."""


@pytest.mark.parametrize(
    "training",
    [recipes.CONTROLLED, recipes.TEXT_ONLY, recipes.REWARDS["none"], recipes.GUIDED_VARS],
    ids=lambda each: each.name,
)
def test_command_lines_say_what_their_titles_say(training, tmp_path):
    config = command_line(command_of(training, 3, tmp_path)[1:], kind=Parsed).config["fit"]
    model, data = config.model.init_args, config.data.init_args
    assert (config.seed_everything, data.seed, config.trainer.limit_val_batches) == (3, 3, 0)
    if training is recipes.CONTROLLED:
        last = config.trainer.callbacks[-1]
        assert last.class_path == "avar_lightning.callbacks.GuidanceController"
        assert (last.init_args.target, model.guidance.form) == (4, "published")
    elif training is recipes.TEXT_ONLY:
        assert (data.style, data.train_pictures, model.guidance.form) == ("reasoned", False, "none")
    elif training is recipes.GUIDED_VARS:
        assert model.visual.transform == "share"
        assert model.vlm.pretrained == str(recipes.HINGE_T.folder(tmp_path, 3) / "hf")
    else:
        assert model.visual is None
        assert model.sampling.seed == 3


def test_another_picture_is_of_the_same_kind():
    columns = [{"task": TASKS[index % 5]} for index in range(10)]
    assert _others(columns) == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    with pytest.raises(AssertionError):
        _others(columns[:9])


def measured(accuracy, vas):
    """A measurement as the tests of a model write it."""
    shares = {role: [0.1, 0.2] for role in ("system", "user", "image", "response")}
    query = {"mean_of_ratios": 10 * vas, "ratio_of_means": vas, "share": 0.5, "attention_shares": shares}
    return {
        "device": "a CPU", "versions": {"torch": "2"}, "num_samples": 4, "accuracy": accuracy,
        "accuracy_note_right": 1.0, "accuracy_note_wrong": 0.0, "follows_wrong_note": 0.5, "no_answer": 0.0,
        "accuracy_by_task": dict.fromkeys(TASKS, accuracy), "answers": {"vas_ratio_of_means_response": vas},
        "describes": 1.0, "reference_loss": 0.1, "system_mass": 0.2, "need_of_picture": 0.3,
        "references": {"user": query, "response": query},
        "validation_map": [[1.0, 9.0, 3.0, 2.0], [8.0, 2.0, 7.0, 1.0]],
    }  # fmt: skip


def write_measured(folder, right, vas):
    folder.mkdir(parents=True)
    result_path(folder).write_text(json.dumps(measured(sum(right) / len(right), vas)))
    rows = [{"id": f"q{index}", "accuracy": float(value)} for index, value in enumerate(right)]
    answers_path(folder).write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))


@pytest.fixture
def results(tmp_path):
    """Two seeds of every training, the second with one question more; anchored is the worst."""
    found = Results(tmp_path, [0, 1])
    for index, training in enumerate(TRAININGS):
        for seed in (0, 1):
            good = training in (recipes.HINGE_T, recipes.GUIDED_GRPO, recipes.GUIDED_VARS) or index % 2
            right = [int(good and training is not recipes.ANCHORED), 0, 1, seed]
            write_measured(training.folder(tmp_path, seed) / "hf", right, vas=1.0 + index)
    for name in ("demo", "demo_small"):
        (folder,) = found._folders(name).values()
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        write_measured(folder, [0, 0, 0, 1], vas=2.0)
    return found


def test_differences_pair_seeds_and_questions(results):
    assert results.values(recipes.ANCHORED, ACCURACY) == [0.25, 0.5]
    gain = results.accuracy_difference(recipes.HINGE_T, recipes.ANCHORED)
    assert (gain.mean, gain.n) == (0.25, 2)
    against_base = results.accuracy_difference(recipes.ANCHORED, "demo")
    assert (against_base.mean, against_base.n) == (0.125, 2)
    relative = results.difference(recipes.HINGE_T, "demo", VAS, relative=True)
    assert relative.mean == pytest.approx((1.0 + TRAININGS.index(recipes.HINGE_T)) / 2.0 - 1)
    result_path(recipes.HINGE_T.folder(results.root, 0) / "hf").unlink()
    assert results.accuracy_difference(recipes.HINGE_T, recipes.ANCHORED).n == 1


@pytest.mark.parametrize("part", [world, relation, lazy, ablation, beyond], ids=lambda part: part.__name__)
def test_every_part_writes_whole_and_half_results(part, results, tmp_path):
    whole = part.write(results, tmp_path)
    assert "nan" not in whole
    for training in TRAININGS[1:]:
        result_path(training.folder(results.root, 1) / "hf").unlink()
    assert "| 1 |" in part.write(results, tmp_path)
    for training in TRAININGS:
        result_path(training.folder(results.root, 0) / "hf").unlink()
    part.write(results, tmp_path)


def test_the_ablation_compares_vars_with_the_same_training_without_it(results, tmp_path):
    row = next(line for line in ablation.write(results, tmp_path).splitlines() if line.startswith("| + VARS"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1:4] == ["2", "62.5 ± 17.7", "+0.0 (+0.0 to +0.0)"]
    assert cells[-2:] == ["56.1", "18.9"]


def test_chosen_heads_are_the_quarter_with_the_highest_vas(tmp_path):
    result_path(tmp_path / "hf").write_text(json.dumps(measured(0.5, 1.0)))
    options = steering.settings_of(tmp_path / "hf", 3)["heads"]
    assert {'heads={"0": [1], "1": [0]}', "seed=3", "ablation=random_heads"} <= set(options)


def test_a_section_is_replaced_between_its_marks_and_nowhere_else():
    text = "a\n<!-- measured: lazy -->\nold\n<!-- end of lazy -->\nb"
    found = page.replaced(text, "lazy", r"new \1", Path("page.md"))
    assert found == "a\n<!-- measured: lazy -->\n\nnew \\1\n\n<!-- end of lazy -->\nb"
    with pytest.raises(ValueError, match="'<!-- measured: relation -->'"):
        page.replaced(text, "relation", "", Path("page.md"))


@pytest.mark.slow
def test_a_training_is_run_measured_and_not_run_again(tmp_path):
    tiny = ("--trainer.max_steps=2", "--data.init_args.batch_size=2")
    one, two = recipes.ANCHORED, recipes.MULTIMODAL
    first = dataclasses.replace(one, name="first", options=(*one.options, *tiny))
    second = dataclasses.replace(two, name="second", start=first, options=(*two.options, *tiny))
    train_all([second], 0, tmp_path, jobs=1)
    weights = [each.folder(tmp_path, 0) / "hf" / "model.safetensors" for each in (first, second)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    before = [path.stat().st_mtime_ns for path in weights]
    train_all([second], 0, tmp_path, jobs=1)
    assert [path.stat().st_mtime_ns for path in weights] == before
    found = Results(tmp_path, [0])
    found.measure([second], jobs=1)
    (mine,) = found.of(second).values()
    assert mine["num_samples"] == 400
    assert 0 < mine["num_swapped"] <= 200
    assert np.isfinite([mine["accuracy"], mine["need_of_picture"], mine["system_mass"]]).all()
    assert found.accuracy_difference(second, second).mean == 0
