r"""Responses that mislead: each is given with what it says, None where it leaves that open.

The question is one of force, with options A: 12 N, B: 42 N, C: 30 N and D: 7 N. Whatever has None may be read by a
judge; a letter that the response does not choose would be a wrong verdict that nobody looks at again.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_lightning.benchmarks import BENCHMARKS, benchmark_of

FORCES = {"A": "12 N", "B": "42 N", "C": "30 N", "D": "7 N"}
CHOICES: dict[str, dict[str, Any]] = {
    "mathvista": {"question_type": "multi_choice", "answer_type": "text", "answer": "42 N"},
    "mathvision": {"question_type": "multiple-choice", "answer": "B"},
    "mathverse_vo": {"question_type": "multi-choice", "answer": "B"},
    "mmmu": {"question_type": "multiple-choice", "answer": "B"},
    "mmmu_pro": {"question_type": "multiple-choice", "answer": "B"},
    "mmmu_pro_vision": {"question_type": "multiple-choice", "answer": "B"},
    "mmstar": {"answer": "B"},
}

# One that every benchmark of letters reads alike.
LETTERS: list[tuple[str, str | None]] = [
    # A box that holds no option hides nothing.
    (r"The force is $\boxed{43}$ N. Answer: B", "B"),
    (r"So F = \boxed{43\text{ N}}. The answer is B.", "B"),
    ("$$\\boxed{F=43}$$\n\nAnswer: B", "B"),
    ("<answer>the force is large</answer> The answer is (B).", "B"),
    # Other options are named after the answer, or are dismissed.
    ("The answer is B, because option C is far too large.", "B"),
    ("Answer: B\n\nOption A would need more force, and option D less.", "B"),
    ("Option A is too small and option C is not right. Therefore it must be B.", "B"),
    ("It is not (A); it is (B).", "B"),
    ("The answer is not A. It is B.", "B"),
    ("Option (A) is wrong, (C) is too large. The correct option is (B) 42 N.", "B"),
    ("Option B is correct; option C is not.", "B"),
    ("B is the correct answer, whereas C is the right angle.", "B"),
    ("The answer is B. This answer is supported by the picture.", "B"),
    ("The answer cannot be (A).", None),
    ("It is not (A).", None),
    ("The answer is not A.", None),
    ("B, being too small, is wrong.", None),
    ("(C) would be too large.", None),
    ("The wrong answer is C.", None),
    ("Option C is incorrect.", None),
    # Options are weighed, several are named, or one is taken back.
    ("The answer is A or B.", None),
    ("The answer is (A) or (B)... wait, (B).", "B"),
    ("The answer is either A or B", None),
    ("The answers are A and B.", None),
    ("A, B", None),
    ("I see (A), yet (C) fits.", None),
    ("Is the answer A? I do not know.", None),
    ("The answer is A? No. It is B.", "B"),
    ("The answer is A. Wait, no. It is B.", "B"),
    ("The answer is A. Wait, let me check that again: 6 times 7", None),
    ("If the answer is A, then the force would be 12 N.", None),
    ("The answer is (B) 12 N.", None),  # letter and text of two options
    ("<answer>B. 12 N</answer>", None),
    # Options are written down once more.
    ("A) 12 N\nB) 42 N\nC) 30 N\nD) 7 N\nWe compute 42 N. So B.", "B"),
    ("A) 12 N\nB) 42 N\nC) 30 N\nD) 7 N", None),
    ("The options are (A) 12 N (B) 42 N (C) 30 N (D) 7 N", None),
    ("**A.** 12 N is too small.\n**B.** 42 N fits.\n**C.** 30 N is too small.", None),
    ("- (A) 12 N: no\n- (B) 42 N: yes\n\n**Answer: (B) 42 N**", "B"),
    # Forms of the letter.
    ("The correct answer is **B**.", "B"),
    ("Final answer: B) 42 N", "B"),
    ("**Final Answer**\n\n**B**", "B"),
    ("### Final Answer\n\n\\[\n\\boxed{\\text{B}}\n\\]", "B"),
    ("(b)", "B"),
    ("b", "B"),
    ("answer is b", "B"),
    ("The answer is:\n\n**B. 42 N**", "B"),
    ("The answer is clearly B.", "B"),
    ("The answer to this question is therefore option B.", "B"),
    ("Therefore, it is B.", "B"),
    ("Hence, B.", "B"),
    ("Thus we choose (B).", "B"),
    ("So the force is 43 N, which corresponds to option B.", "B"),
    ("Here 12 N corresponds to option A and 43 N corresponds to option B.", None),
    ("The best answer is B rather than A.", "B"),
    ("Therefore, A is parallel to B.", None),
    ("The answer is $\\mathbf{B}$", "B"),
    ("B\n\nOption C is too large.", "B"),
    ("B. 42 N\n\nThe mass is 6 kg.", "B"),
    ("答案：B", "B"),
    ("选B", "B"),
    ("所以答案是 B。", "B"),
    ("因此，正确答案是（B）。", "B"),
    ("不选B", None),
    ("答案不是B", None),
    # Letters of other things.
    ("The answer is A large force of some kind.", None),
    ("A force acts on the point B.", None),
    ("The line runs from A to B.", None),
    ("I am sure.", None),
    ("The angle at B is right.", None),
    ("B is the right angle.", None),
    ("Triangle ABC has its centre in (A).", None),
    ("We choose B as the origin.", None),
    ("<think>The answer is B.</think>", None),
    ("<think>It may be (C).</think>The answer is B.", "B"),
]


@pytest.mark.parametrize(("response", "letter"), LETTERS)
def test_the_letter_that_a_response_chooses(response: str, letter: str | None) -> None:
    read = {name: benchmark_of(name).extract(response, {"options": FORCES, **CHOICES[name]}) for name in CHOICES}
    assert read == dict.fromkeys(CHOICES, letter)


@pytest.mark.parametrize(("response", "letter"), [case for case in LETTERS if "12 N" not in case[0]])
def test_letters_of_options_that_are_not_known(response: str, letter: str | None) -> None:
    assert benchmark_of("mmstar").extract(response, {"options": {}, "answer": "B"}) == letter


@pytest.mark.parametrize("name", ["mathvista", "mathvision", "mathverse_vo"])
@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{42}", None),  # of no option, as far as text goes; N is understood
        ("The answer is 42 N.", "B"),
        ("The answer is about what one expects.", None),
        ("The answer is 43 N.", None),
        ("<answer>not A</answer>", None),
        ("<answer>maybe a bit more</answer>", None),
        (r"\boxed{42.0 \text{ N}}", "B"),
    ],
)
def test_a_choice_is_an_option_or_nothing(name: str, response: str, letter: str | None) -> None:
    columns = {"options": FORCES, **CHOICES[name]}
    expected = "B" if response == r"\boxed{42}" else letter
    assert benchmark_of(name).extract(response, columns) == expected


def test_the_last_line_that_mmmu_pro_prescribes_comes_before_a_box() -> None:
    for name in ("mmmu_pro", "mmmu_pro_vision"):
        columns = {"options": FORCES, **CHOICES[name]}
        assert benchmark_of(name).extract("\\boxed{A} was my guess.\nAnswer: B", columns) == "B"
        assert benchmark_of(name).extract(r"\boxed{12\text{ N}}. Answer: B", columns) == "B"


def vista(kind: str, answer: str, precision: int | None = None, **more: Any) -> dict[str, Any]:
    return {"question_type": "free_form", "answer_type": kind, "precision": precision, "answer": answer, "options": {},
            **more}  # fmt: skip


@pytest.mark.parametrize(
    ("response", "columns", "right"),
    [
        ("The final list is [0, 2, 4].", vista("list", "[0, 2, 4]"), True),
        ("Therefore the final list is:\n\n[0, 2, 4]", vista("list", "[0, 2, 4]"), True),
        ("The list is\n```python\n[0, 2, 4]\n```", vista("list", "[0, 2, 4]"), True),
        ("From [1, 2] one gets [0, 2, 4]", vista("list", "[0, 2, 4]"), True),
        ("It is [0, 2, 4], as the answer is found by counting.", vista("list", "[0, 2, 4]"), True),
        ("The answer is:\n\n$$\n5\n$$", vista("integer", "5"), True),
        ("**Answer:**\n\n\\[\n5\n\\]", vista("integer", "5"), True),
        ("The answer is $1{,}200{,}000$.", vista("integer", "1200000"), True),
        (r"\boxed{1\,200\,000}", vista("integer", "1200000"), True),
        ("<answer>1 200 000</answer>", vista("integer", "1"), None),
        ("<answer>1.2 million people</answer>", vista("integer", "1200000"), True),
        ("<answer>1.2 million</answer>", vista("float", "1.2", 1), True),
        ("<answer>1.2 million</answer>", vista("integer", "1"), False),
        ("<answer>–12.5</answer>", vista("float", "-12.5", 1), True),
        ("<answer>–12.5</answer>", vista("float", "12.5", 1), False),
        ("The answer is –12.5 m.", vista("float", "-12.5", 1), True),
        ("<answer>25%</answer>", vista("float", "0.25", 2), True),
        ("<answer>25%</answer>", vista("integer", "25"), True),
        ("<answer>25%</answer>", vista("integer", "0"), False),
        (r"<answer>12\frac{1}{2}</answer>", vista("float", "12.5", 1), True),
        (r"<answer>12\frac{1}{2}</answer>", vista("float", "60.5", 1), False),
        ("The answer is not 5. It is 6.", vista("integer", "5"), False),
        ("The answer is not 5. It is 6.", vista("integer", "6"), True),
        ("The answer is not 5.", vista("integer", "5"), None),
        ("The answer is 5 or 6.", vista("integer", "5"), None),
        ("<think>The answer is 5.", vista("integer", "5"), None),
        ("The solution is found by adding. The answer is 5. Done.", vista("integer", "5"), True),
        (r"\boxed{10 \text{ million}}", vista("integer", "10000000"), True),
        ("So x is approximately 3.14.", vista("float", "3.14", 2), True),
        (r"The answer is 5. \boxed{}", vista("integer", "5"), True),
    ],
)
def test_numbers_and_lists_of_mathvista(response: str, columns: dict[str, Any], right: bool | None) -> None:
    extracted = BENCHMARKS["mathvista"].extract(response, columns)
    assert (None if extracted is None else BENCHMARKS["mathvista"].score(extracted, columns)) is right


@pytest.mark.parametrize("name", ["mathvision", "mathverse_vo"])
def test_a_sentence_is_no_value(name: str) -> None:
    columns = {"question_type": "free-form", "options": {}, "answer": "5"}
    for response in ("So there are **5** dogs.", "<answer>It is one more than four.</answer>"):
        assert benchmark_of(name).extract(response, columns) is None


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("No difference is visible between the two lines. So yes, they are equal.", None),
        ("There is no difference between the two lines.", None),
        ("No. Wait, they are of the same length, so yes.", None),
        ("Yes. Wait, one is longer, so no.", None),
        ("The answer is not yes.", None),
        ("The answer is yes or no.", None),
        ("Is the answer yes? I cannot say.", None),
        ("**Answer:** **Yes**", "yes"),
        ("Yes, no two of them differ.", "yes"),
        ("No, they differ; the answer is no.", "no"),
        ("At first: no. Yet the answer is yes.", "yes"),
        ("The answer is no one can tell.", None),
        ("No problem: the lines are equal.", None),
        ("<think>No.</think>", None),
        (r"\boxed{\text{Yes}}", "yes"),
    ],
)
def test_yes_or_no(response: str, said: str | None) -> None:
    columns = {"category": "VD", "figure_id": "1", "answer": "yes"}
    assert BENCHMARKS["hallusionbench"].extract(response, columns) == said


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["yes", "no", "the", "line", "is", "longer", "I", "see", "so"]), min_size=1, max_size=6)
)
def test_yes_or_no_is_that_of_vlmevalkit_or_left_open(words: list[str]) -> None:
    sentence = "I think " + " ".join(words) + "."
    kit = {"yes", "no"} & set(words)  # its YOrN_Extraction: one of both words, or unknown
    said = BENCHMARKS["hallusionbench"].extract(sentence, {})
    assert said in ((next(iter(kit)), None) if len(kit) == 1 else (None,))
    assert said or len(kit) != 1 or "no longer" in sentence


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    "before", ["So", "Therefore, it is", "Adding all, the answer is", "Hence we choose option", "It is"]
)
def test_what_ends_with_a_letter_is_read_as_by_the_authors_of_math_v(name: str, before: str) -> None:
    for letter in FORCES:
        for response in (f"{before} {letter}.", f"We look at it.\n{before} ({letter})."):
            ends = [each for each in "ABCDE" if response.endswith((f" {each}.", f" ({each})."))]
            assert [benchmark_of(name).extract(response, {"options": FORCES, **CHOICES[name]})] == ends == [letter]


JUDGED = {
    **{name: {"options": FORCES, "question": "How large?", **columns} for name, columns in CHOICES.items()},
    "open": {"question_type": "open", "options": {}, "answer": "42", "question": "How large?"},
}
NOT_GIVEN = ("NONE", "**NONE**", "None given", "None.", "`none`", "The final answer of the response is not given.",
             "No final answer is given.", "Final answer: NONE", "<think>It is B.", "<think>B</think>", "")  # fmt: skip


@pytest.mark.parametrize("name", JUDGED)
def test_a_judge_that_found_nothing(name: str) -> None:
    benchmark = benchmark_of("mathvision" if name == "open" else name)
    read = {reply: benchmark.read_judgement(reply, JUDGED[name]) for reply in NOT_GIVEN}
    assert read == dict.fromkeys(NOT_GIVEN)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    "reply",
    ["<think>The response says B, not A.</think>\n\nB", "The final answer is (B).", "**B**", "(B) 42 N", "42 N",
     "The final answer of the response is B.", "Final answer of the response: B"],
)  # fmt: skip
def test_a_judge_that_thinks_or_says_more_than_the_letter(name: str, reply: str) -> None:
    assert benchmark_of(name).read_judgement(reply, JUDGED[name]) == "B"


@pytest.mark.parametrize("name", ["mathvision", "mathverse_vo"])
def test_a_judge_that_thinks_about_a_value(name: str) -> None:
    columns = {"question_type": "open", "options": {}, "answer": "42"}
    read = benchmark_of(name).read_judgement
    assert read("<think>It says 41, then 42.</think>\n\n**42**", columns) == "42"
    assert read("The final answer of the response is 42.", columns) == "42"
    assert read("None of them", columns) == "None of them"


def test_a_judge_of_yes_and_no() -> None:
    read = BENCHMARKS["hallusionbench"].read_judgement
    said = {reply: read(reply, {}) for reply in ("<think>No?</think> yes", "**No**", "No.", "Yes, it says so.",
            "The final answer is no.", "unclear", "No final answer is given.", "NONE", "<think>no")}  # fmt: skip
    assert list(said.values()) == ["yes", "no", "no", "yes", "no", "unclear", None, None, None]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_nobody_is_asked_about_a_response_that_was_cut_while_it_thought(name: str) -> None:
    columns = JUDGED.get(name) or {"question": "Is it?", "answer": "yes"}
    assert benchmark_of(name).extraction_prompt("<think>It may be B, or", columns) is None
    assert "It is hard to say" in str(benchmark_of(name).extraction_prompt("It is hard to say", columns))
