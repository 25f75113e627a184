"""Each filter on texts made by hand, and the bounds of what is measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avar_lightning.synthesis import FilterConfig
from avar_lightning.synthesis.filters import (
    anchor_positions,
    anchor_spread,
    first_objection,
    forbidden_phrase,
    normalised,
    repetition,
    score,
    word_list,
)

FILLER = " ".join(f"Then step {i} gives value {i * i}." for i in range(8))
GOOD = (
    f"I look at the triangle. {FILLER} Let me look back at the legend: blue. {FILLER.replace('step', 'part')} I see 5."
)


def objection(chain, **limits):
    config = FilterConfig(**limits)
    found = first_objection(chain, score(chain, config), config)
    return None if found is None else found[0]


def test_a_good_chain_passes():
    assert objection(GOOD) is None


@pytest.mark.parametrize(
    ("chain", "limits", "name"),
    [
        (GOOD, {"min_words": 500}, "length"),
        (GOOD, {"min_words": 1, "max_words": 50}, "length"),
        (GOOD + GOOD, {}, "repetition"),
        (GOOD + " The caption agrees.", {}, "mention"),
        (GOOD, {"min_anchors": 4}, "anchors"),
        (FILLER, {}, "anchors"),
        (GOOD, {"anchor_parts": 4, "min_parts": 4}, "spread"),
        (f"I see a cube. In the image it is red. {FILLER}", {}, "spread"),
    ],
)
def test_each_filter_rejects(chain, limits, name):
    assert objection(chain, **limits) == name


@pytest.mark.parametrize(
    ("chain", "limits"),
    [
        (GOOD, {"min_anchors": 3, "min_parts": 3}),
        (FILLER, {"min_anchors": 0, "min_parts": 0}),
        (GOOD + GOOD, {"max_repetition": 0.6}),
        (GOOD + " The caption agrees.", {"forbidden": []}),
        (f"Regarde la figure. {FILLER} Regarde encore.", {"anchors": ["regarde"]}),
    ],
)
def test_limits_can_be_moved(chain, limits):
    assert objection(chain, **limits) is None


@pytest.mark.parametrize(
    "text",
    [
        "Let me look back at the triangle.",
        "Looking again, the bar is taller.",
        "Let me take a closer look: looking closely, it is 5.",
        "I look at the picture.",
        "In the figure, AB is 3.",
        "According to the bar chart this is so; on the left chart it is not.",
        "Checking the diagram, yes.",
        "I can see two dots.",
        "I now see it.",
        "The graph shows a peak.",
        "Going back to the legend.",
        "A visual check confirms it.",
    ],
)
def test_returns_to_the_image_are_found(text):
    assert anchor_positions(text)


@pytest.mark.parametrize(
    "text",
    [
        "Two plus two is four.",
        "The image of f under g is open.",
        "We picture a number line.",
        "Seeing that n is even, halve it.",
        "It looks right.",
        "Overlooking this is a mistake.",
    ],
)
def test_what_looks_at_nothing_is_no_return(text):
    assert not anchor_positions(text)


def test_one_phrase_is_one_return():
    assert len(anchor_positions("Looking back at the image, two.")) == 1
    assert len(anchor_positions("I see one. I see two. In the picture, three.")) == 3
    assert anchor_positions("I see one.") == [0]


@pytest.mark.parametrize(
    "text",
    [
        "The description says red.",
        "According to the image description, it is red.",
        "As described, it is red.",
        "Based on the provided detailed description it is red.",
        "The caption mentions a dog.",
        "It was described earlier.",
        "From the given text we know this.",
    ],
)
def test_words_that_give_the_source_away_are_found(text):
    assert forbidden_phrase(text)


@pytest.mark.parametrize(
    "text",
    ["The sign reads STOP.", "The text on the label is blue.", "This describes a circle.", "We describe the arc by t."],
)
def test_words_of_the_image_are_allowed(text):
    assert forbidden_phrase(text) is None


def test_responses_are_the_same_but_for_marks_and_case():
    assert normalised("A  dog, I see!") == normalised("a dog i see")
    assert normalised("I see 1.5") != normalised("I see 15")


@given(st.text(alphabet="ab c.\n", max_size=200), st.integers(1, 9))
def test_repetition_is_a_share(text, n):
    found = repetition(text, n)
    assert 0 <= found < 1
    words = word_list(text)
    rows = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert (found == 0) == (len(set(rows)) == len(rows))


@given(st.text(alphabet="ab c", min_size=40, max_size=200), st.integers(1, 9))
def test_a_text_said_twice_repeats_about_half(text, n):
    if len(word_list(text)) >= n:
        doubled = f"{text} {text}"
        assert repetition(doubled, n) >= repetition(text, n) / 2
        assert repetition(doubled, n) > 0


@given(st.text(min_size=1, max_size=300), st.data(), st.integers(1, 12))
def test_spread_is_a_share_that_more_anchors_never_lower(chain, data, parts):
    positions = data.draw(st.lists(st.integers(0, len(chain) - 1), max_size=20))
    found = anchor_spread(chain, positions, parts)
    assert 0 <= found <= min(1, len(positions) / parts) + 1e-9
    assert anchor_spread(chain, [*positions, 0], parts) >= found
    if len(chain) >= parts:
        assert anchor_spread(chain, range(len(chain)), parts) == 1


@given(st.text(max_size=300))
def test_anchors_are_in_order_and_inside(chain):
    positions = anchor_positions(f"I see {chain} in the image")
    assert positions == sorted(set(positions))
    assert positions[0] == 0
    assert all(0 <= position < len(chain) + 30 for position in positions)
