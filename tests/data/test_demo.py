import random
from collections import Counter

import numpy as np
import pytest

from avar_lightning.data.demo import (
    COLOURS,
    MIXTURES,
    STYLES,
    TASKS,
    Angle,
    Chart,
    Grid,
    demo_samples,
    pretraining_samples,
    respond,
    sample_problem,
)
from avar_lightning.rewards import extract_answer


def stream(count=50, **options):
    options = {"style": "anchored", "hint_rate": 0.8, "seed": 3, "split": "train"} | options
    return list(demo_samples(count, **options))


def test_same_seed_gives_the_same_samples_and_pictures():
    first, again, other = stream(), stream(), stream(seed=4)
    assert [sample.messages for sample in first] == [sample.messages for sample in again]
    assert all(a.images[0].tobytes() == b.images[0].tobytes() for a, b in zip(first, again))
    assert [sample.messages for sample in first] != [sample.messages for sample in other]


@pytest.mark.slow
def test_style_and_count_do_not_change_the_questions():
    by_style = [[sample.messages[1] for sample in stream(style=style)] for style in STYLES]
    assert by_style[0] == by_style[1] == by_style[2]
    assert [sample.fields() for sample in stream(20)] == [sample.fields() for sample in stream(50)][:20]


def test_without_pictures_the_scene_stands_in_words():
    for shown, told in zip(stream(), stream(pictures=False)):
        question = shown.messages[1]["content"][-1]["text"]
        (part,) = told.messages[1]["content"]
        scene = part["text"].removesuffix(question)
        assert shown.messages[2] == told.messages[2]
        assert f"I look at the picture. {scene}I look again." in told.messages[2]["content"]
        assert (len(shown.images), len(told.images)) == (1, 0)


def test_splits_share_no_picture():
    tasks = [task for task in TASKS if task != "angle"]  # whose pictures are few enough to meet by chance
    pictures = [
        {sample.images[0].tobytes() for sample in stream(300, split=split, tasks=tasks)}
        for split in ("train", "val", "test")
    ]
    assert len(set().union(*pictures)) == sum(map(len, pictures))


def test_tasks_have_equal_shares():
    assert Counter(sample.columns["task"] for sample in stream(100)) == dict.fromkeys(TASKS, 20)


@pytest.mark.parametrize("rate", [0.8, 0.25])
def test_notes_are_right_at_the_rate_asked_for(rate):
    samples = stream(2000, hint_rate=rate)
    right = [sample.columns["note"] == sample.answer for sample in samples]
    assert right == [sample.columns["note_right"] for sample in samples]
    assert abs(np.mean(right) - rate) < 0.03  # 2,000 draws: three standard deviations


@pytest.mark.parametrize("style", STYLES)
def test_every_response_ends_in_the_answer(style):
    for sample in stream(100, style=style):
        assert extract_answer(sample.messages[-1]["content"]) == sample.answer


def test_only_anchored_responses_mention_looking():
    for sample in stream(100, style="reasoned"):
        assert not {"look", "picture", "see"} & set(sample.messages[-1]["content"].replace(".", " ").split())
    for sample in stream(100, style="anchored"):
        response = sample.messages[-1]["content"]
        assert "I look at the picture." in response
        assert "I look again" in response


def solve(scene, question):
    """The answer, found from the words of the question and the scene alone."""
    words = question.rstrip("?").replace(",", "").split()
    if isinstance(scene, Angle):
        return str(scene.degrees)
    if isinstance(scene, Chart):
        heights = dict(scene.bars)
        if "tallest" in words:
            return max(heights, key=heights.__getitem__)
        high, low = [word for word in words if word in heights]
        return str(heights[high] - heights[low])
    cells = dict(zip("ABCDEFGHI", scene.cells))
    if "same" in words:
        first, second = (cells[word].split() for word in words if word in cells)
        part = 0 if words[-1] == "colour" else -1
        return "yes" if first[part] == second[part] else "no"
    if "in" in words:
        return cells[words[-1]]
    return str(" ".join(scene.cells).split().count(words[words.index("many") + 1]))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_wrong_ones_wrong(task):
    for seed in range(200):
        problem = sample_problem(task, random.Random(seed))
        assert problem.answer == solve(problem.scene, problem.question)
        assert problem.wrong
        assert problem.answer not in problem.wrong


def test_pictures_show_their_scene():
    for seed in range(50):
        rng = random.Random(seed)
        grid = Grid.sample(rng)
        pixels = np.asarray(grid.draw(rng))
        for index, cell in enumerate(grid.cells):
            centre = tuple(pixels[index // 3 * 28 + 14, index % 3 * 28 + 14])
            assert centre == ((255, 255, 255) if cell == "empty" else COLOURS[cell.split()[0]])
        chart = Chart.sample(rng)
        pixels = np.asarray(chart.draw(rng))
        for index, (colour, height) in enumerate(chart.bars):
            column = pixels[:, index * 28 + 14]
            assert abs((column == COLOURS[colour]).all(axis=1).sum() - 12 * height) <= 2


@pytest.mark.parametrize("degrees", [30, 60, 90, 120])
def test_triangles_stay_inside_the_picture(degrees):
    for seed in range(30):
        pixels = np.asarray(Angle(degrees).draw(random.Random(seed))).astype(int)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).all()


@pytest.mark.parametrize("stage", MIXTURES)
def test_pretraining_never_reasons_and_has_every_kind(stage):
    samples = list(pretraining_samples(300, stage=stage, seed=0))
    kinds = Counter(sample.source.rpartition("/")[2] for sample in samples)
    assert set(kinds) == set(MIXTURES[stage])
    assert not any("<think>" in str(sample.messages) for sample in samples)
    for sample in samples:
        parts = sample.messages[1]["content"]
        assert len(sample.images) == sum(part["type"] == "image" for part in parts)


def test_unknown_task_and_style_are_named():
    with pytest.raises(ValueError, match="'maze'"):
        sample_problem("maze", random.Random(0))
    with pytest.raises(ValueError, match="'hear'"):
        next(pretraining_samples(1, stage="hear", seed=0))
    with pytest.raises(ValueError, match="'poem'"):
        respond(sample_problem("count", random.Random(0)), "1", "poem")
