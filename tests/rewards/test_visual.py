import math

import pytest
import torch

from avar_lightning.rewards import TRANSFORMS, VisualAttentionReward, visual_attention

# Two layers, one sample, two heads, three tokens of which the last is none of the completion's.
IMAGE = torch.tensor([[[[0.6, 0.2, 0.9], [0.2, 0.2, 0.9]]], [[[0.1, 0.4, 0.9], [0.3, 0.0, 0.9]]]])
SYSTEM = torch.tensor([[[[0.1, 0.1, 0.0], [0.3, 0.1, 0.0]]], [[[0.2, 0.1, 0.0], [0.2, 0.3, 0.0]]]])
QUERIES = torch.tensor([[True, True, False]])
# Heads averaged first: image (0.4, 0.2), (0.2, 0.2); system (0.2, 0.1), (0.2, 0.2).
RATIOS = [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("ratio", sum(RATIOS) / 4),
        ("tanh", sum(RATIOS) / 4),
        ("log", (2 * math.log(3) + 2 * math.log(2)) / 4),
        ("share", (2 * 2 / 3 + 2 * 1 / 2) / 4),
    ],
)
def test_worked_by_hand(transform, expected):
    found = visual_attention(IMAGE, SYSTEM, QUERIES, transform=transform)
    assert found.tolist() == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_samples_without_what_it_takes_are_undefined_and_earn_nothing(transform):
    nothing = torch.zeros_like(IMAGE)
    for image, system, queries in (
        (nothing, SYSTEM, QUERIES),
        (IMAGE, nothing, QUERIES),
        (IMAGE, SYSTEM, torch.zeros_like(QUERIES)),
    ):
        assert visual_attention(image, system, queries, transform=transform).isnan().all()
    reward = VisualAttentionReward(transform)
    assert reward(["a", "b"], accuracy=[1.0, 1.0], visual_attention=[math.nan, math.nan], num_generations=2) == [
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_wrong_answers_earn_nothing(transform):
    reward = VisualAttentionReward(transform)
    found = reward(["a"] * 4, accuracy=[0.0, 1.0, None, 1.0], visual_attention=[9.0, 5.0, 7.0, 1.0], num_generations=4)
    assert found[0] == found[2] == 0.0
    assert found[1] > found[3]


def test_tanh_compares_within_the_group():
    reward = VisualAttentionReward("tanh")
    found = reward(["a"] * 4, accuracy=[1.0] * 4, visual_attention=[1.0, 3.0, 100.0, 300.0], num_generations=2)
    assert found == pytest.approx([-math.tanh(1), math.tanh(1)] * 2)
    equal = reward(["a"] * 2, accuracy=[1.0] * 2, visual_attention=[2.0, 2.0], num_generations=2)
    assert equal == [0.0, 0.0]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="transform is 'square'"):
        visual_attention(IMAGE, SYSTEM, QUERIES, transform="square")
    with pytest.raises(ValueError, match=r"visual\.transform is 'square'"):
        VisualAttentionReward("square")
    with pytest.raises(ValueError, match=r"visual\.weight=-1"):
        VisualAttentionReward(weight=-1)
