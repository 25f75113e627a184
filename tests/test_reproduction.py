import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "reproduction"))

import page
import recipes
import relation
import results
import steering
import testing
import training


def test_an_interval_of_seeds_is_students():
    found = results.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5 / 5)  # by hand: variance 2.5, t of four degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert found.significant
    assert not results.interval([-1.0, 0.0, 1.5]).significant
    assert f"{results.interval([1.0]):+.1f}" == "+1.0"
    assert f"{found.scaled(10):+.0f}" == "+30 (+10 to +50) *"


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


def test_every_training_is_there_once():
    trainings = [model for model in relation.NEEDS if isinstance(model, recipes.Training)]
    assert len({each.name for each in trainings}) == len({each.title for each in trainings}) == len(set(trainings))
    assert len(trainings) >= 12


def test_differences_pair_seeds(tmp_path):
    found = results.Results(tmp_path, [0, 1, 2])
    for model, values in ((recipes.ANCHORED, {0: 0.5, 1: 0.6}), (recipes.HINGE_T, {1: 0.7, 2: 0.1})):
        for seed, value in values.items():
            path = testing.result_path(model.folder(tmp_path, seed) / "hf")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"accuracy": value}))
    difference = found.difference(recipes.HINGE_T, recipes.ANCHORED, results.ACCURACY)
    assert (difference.n, difference.mean) == (1, pytest.approx(0.1))


def test_a_section_is_replaced_between_its_marks_and_nowhere_else():
    text = "a\n<!-- measured: lazy -->\nold\n<!-- end of lazy -->\nb"
    found = page._replaced(text, "lazy", r"new \1", Path("page.md"))
    assert found == "a\n<!-- measured: lazy -->\n\nnew \\1\n\n<!-- end of lazy -->\nb"
    with pytest.raises(ValueError, match="'<!-- measured: relation -->'"):
        page._replaced(text, "relation", "", Path("page.md"))


def test_chosen_heads_are_the_half_with_the_highest_vas(tmp_path):
    path = testing.result_path(tmp_path / "hf")
    path.write_text(json.dumps({"validation_map": [[1.0, 9.0, 3.0], [8.0, 2.0, 7.0]]}))
    assert 'heads={"0": [1], "1": [0, 2]}' in steering._heads(tmp_path / "hf")


@pytest.mark.slow
def test_a_training_is_run_measured_and_not_run_again(tmp_path):
    tiny = ("--trainer.max_steps=2", "--data.init_args.batch_size=2")
    first = dataclasses.replace(recipes.ANCHORED, name="first", options=(*recipes.ANCHORED.options, *tiny))
    second = dataclasses.replace(
        recipes.MULTIMODAL, name="second", start=first, options=(*recipes.MULTIMODAL.options, *tiny)
    )
    training.train_all([second], 0, tmp_path, jobs=1)
    weights = [each.folder(tmp_path, 0) / "hf" / "model.safetensors" for each in (first, second)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    before = [path.stat().st_mtime_ns for path in weights]
    training.train_all([second], 0, tmp_path, jobs=1)
    assert [path.stat().st_mtime_ns for path in weights] == before
    found = results.Results(tmp_path, [0])
    found.measure([second, "demo"], jobs=1)
    (mine,), (base,) = found.of(second), found.of("demo")
    assert base["num_samples"] == 300
    assert 0.3 < base["accuracy"] < 0.7  # between a guess and all
    assert base["picture_gain"] > 0
    assert mine["references"]["response"]["ratio_of_means"] != base["references"]["response"]["ratio_of_means"]
