import pytest

from avar_lightning.rewards import accuracy_reward, extract_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> or rather <answer> 2 </answer>", "2"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer>open", None),
        ("", None),
    ],
)
def test_extract_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [("4", 4, 1.0), ("4.0", "4", 1.0), ("Yes", "yes", 1.0), ("40", "4", 0.0), ("", "4", 0.0), ("nan", "4", 0.0)],
)
def test_accuracy_compares_numbers_as_numbers_and_text_without_case(given, gold, right):
    assert accuracy_reward([f"<answer>{given}</answer>"], [gold], other_column=["ignored"]) == [right]


def test_missing_answers_are_an_error():
    with pytest.raises(ValueError, match="2 completions came with 1 answers"):
        accuracy_reward(["a", "b"], ["a"])
