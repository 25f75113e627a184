"""Scorers against cases worked by hand from the rules of each benchmark's authors.

A case is a response, what is extracted from it, and whether that is right. Nothing is extracted where it says None.
"""

from __future__ import annotations

import string
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_lightning.benchmarks import BENCHMARKS, benchmark_of, benchmark_reward
from avar_lightning.benchmarks.answers import conclusion
from avar_lightning.benchmarks.letters import choose
from avar_lightning.benchmarks.mathvista import edit_distance
from avar_lightning.benchmarks.options import letter_of, options_in

Case = tuple[str, str | None, bool]
CATS = {"A": "a cat", "B": "a dog", "C": "cat and A", "D": "none of them"}
MMSTAR = {"options": CATS, "answer": "B"}
VISTA_CHOICE = {"question_type": "multi_choice", "answer_type": "text", "answer": "24°",
                "options": {"A": "18°", "B": "24°", "C": "no angle"}}  # fmt: skip


def vista(answer: str, kind: str, precision: int | None = None) -> dict[str, Any]:
    return {"question_type": "free_form", "answer_type": kind, "precision": precision, "answer": answer, "options": {}}


def check(name: str, columns: dict[str, Any], cases: Sequence[Case]) -> None:
    benchmark = benchmark_of(name)
    for response, expected, right in cases:
        extracted = benchmark.extract(response, columns)
        assert extracted == expected, response
        assert extracted is None or benchmark.score(extracted, columns) is right, response


def test_mmstar() -> None:
    check("mmstar", MMSTAR, [
        ("B", "B", True),
        ("B: a dog", "B", True),
        ("(B) a dog is what I see.", "B", True),
        ("Option B", "B", True),
        ("The answer is B.", "B", True),
        ("A dog sits there. So the answer is (B).", "B", True),  # "A" begins the sentence
        ("A dog sits on it.", None, False),
        ('I looked at it. The answer is "a dog".', "B", True),
        ("A. a cat", "A", False),
        ("a dog", "B", True),
        ("<think>The answer is A? No.</think><answer>B</answer>", "B", True),
        ("<think>The answer is A? No.</think>\n\n**Answer: B**", "B", True),
        ("<think>It could be B, the answer is B, but", None, False),  # cut while it thought
        (r"So \boxed{\text{B}}", "B", True),
        ("<answer>The correct option is B</answer>", "B", True),
        ("<answer>B. a dog and A</answer>", "B", True),  # begins with the letter
        ("<answer>cat and A</answer>", "C", False),
        ("The answer is X.", None, False),
        ("", None, False),
    ])  # fmt: skip


def test_mathvista_choices_by_letter_text_and_edit_distance() -> None:
    check("mathvista", VISTA_CHOICE, [
        ("<answer>B</answer>", "B", True),
        ("(B) 24°", "B", True),
        ("24°", "B", True),
        ("<answer>about 24°</answer>", "B", True),
        ("<answer>24 degrees</answer>", "B", True),
        ("<answer>18</answer>", "A", False),
        ("<answer>no idea</answer>", None, False),
        ('The answer is "24°".', "B", True),
        ("Angles add up to 180°, thus the answer is C.", "C", False),
        ("I see (A), yet (B) fits.", None, False),
        ("I would rather not say.", None, False),
    ])  # fmt: skip
    # What a judge extracted, which may be text.
    assert BENCHMARKS["mathvista"].score("about 24°", VISTA_CHOICE)  # distances 8, 6, 8
    assert not BENCHMARKS["mathvista"].score("24 degrees", VISTA_CHOICE)  # 10, 8, 7: nearest to "no angle"


def test_mathvista_integers() -> None:
    check("mathvista", vista("12000", "integer"), [
        ("12000", "12000", True),
        ("12,000", "12000", True),
        ("<answer>12,000 people</answer>", "12000", True),
        (r"\boxed{12000}", "12000", True),
        ("The answer is 12000.7.", "12000.7", True),  # int() cuts
        ("There are 3 rows of 4000, so the answer is 12000.", "12000", True),
        ("There are 3 rows of 4000 people.", None, False),
        ("<answer>3 or 12000</answer>", None, False),
        ("<answer>x = 12000</answer>", "12000", True),
        ("<answer>-12000</answer>", "-12000", False),
    ])  # fmt: skip


def test_mathvista_floats_are_rounded_to_their_precision() -> None:
    check("mathvista", vista("-3.0", "float", 1), [
        ("-3.0", "-3", True),
        ("-3", "-3", True),
        ("<answer>-3.04 m</answer>", "-3.04", True),
        ("<answer>-3.06</answer>", "-3.06", False),
        ("<answer>3.0</answer>", "3", False),
        ("The final answer is −3.", "-3", True),
    ])  # fmt: skip
    check("mathvista", vista("0.75", "float", 2), [
        (r"\boxed{\frac{3}{4}}", "0.75", True),
        ("<answer>3/4</answer>", "0.75", True),
        ("<answer>.754</answer>", "0.754", True),
        ("<answer>$0.76</answer>", "0.76", False),
        ("<answer>about three quarters</answer>", None, False),
    ])  # fmt: skip


def test_mathvista_lists() -> None:
    check("mathvista", vista("[0, 2, 4]", "list"), [
        ("[0, 2, 4]", "[0, 2, 4]", True),
        ("The answer is [0,2,4].", "[0, 2, 4]", True),
        ("<answer>0, 2 and 4</answer>", "[0, 2, 4]", True),
        ("<answer>[4, 2, 0]</answer>", "[4, 2, 0]", False),
        ("<answer>[0, 2]</answer>", "[0, 2]", False),
        ("<answer>[0, 2, oops]</answer>", None, False),
        ("<answer>even numbers</answer>", None, False),
    ])  # fmt: skip


def test_mathvision() -> None:
    half = {"options": {}, "answer": r"\frac{1}{2}"}
    check("mathvision", half, [
        (r"Thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}", True),
        (r"First \boxed{3}, then \boxed{0.5}", "0.5", True),
        ("The answer is 1/2.", "1/2", True),
        ("The value of x is 0.5.", "0.5", True),
        (r"\boxed{0.504}", "0.504", True),  # two decimals
        (r"\boxed{0.51}", "0.51", False),
        (r"\boxed{x = 0.5}", "x = 0.5", True),
        ("It is hard to tell how large that angle really is", None, False),
    ])  # fmt: skip
    letters = {"options": dict(zip("ABCDE", ["1", r"$\frac{1}{2}$", "3", "4", "5"])), "answer": "B"}
    check("mathvision", letters, [
        (r"\boxed{B}", "B", True),
        (r"\boxed{(B)}", "B", True),
        (r"\boxed{\frac{1}{2}}", "B", True),  # its text
        (r"\boxed{0.5}", "B", True),  # the value of the right option
        (r"\boxed{0.6}", None, False),
        (r"\boxed{3}", "C", False),
        ("The correct answer is C.", "C", False),
    ])  # fmt: skip
    check("mathvision", {"options": {}, "answer": "(2,3)"}, [(r"\boxed{(2, 3)}", "(2, 3)", True)])


def test_mathverse() -> None:
    choice = {"question_type": "multi-choice", "options": {"A": "40°", "B": "50°"}, "answer": "B"}
    check("mathverse_vo", choice, [
        ("B", "B", True),
        ("<answer>B: 50°</answer>", "B", True),
        ("<answer>50°</answer>", "B", True),
        ("<answer>50 degrees</answer>", "B", True),
        ("A straight line has 180°. The correct option is A", "A", False),
        ("Cannot be determined from the picture as far as I can see it here", None, False),
    ])  # fmt: skip
    free = {"question_type": "free-form", "options": {}, "answer": "14 cm"}
    check("mathverse_vo", free, [
        ("<answer>14</answer>", "14", True),
        ("<answer>14 cm</answer>", "14 cm", True),
        ("<answer>14 m</answer>", "14 m", False),
        ("So the answer is 15 cm.", "15 cm", False),
    ])  # fmt: skip
    root = {"question_type": "free-form", "options": {}, "answer": r"2 \sqrt{3}"}
    check("mathverse_vo", root, [(r"\boxed{\sqrt{12}}", r"\sqrt{12}", True), (r"\boxed{3.46}", "3.46", False)])


def test_mmmu_multiple_choice() -> None:
    columns = {"question_type": "multiple-choice", "options": {"A": "$6", "B": "$7", "C": "$8"}, "answer": "B"}
    check("mmmu", columns, [
        ("B", "B", True),
        ("(B)", "B", True),
        ("It is not (A); it is (B)", "B", True),  # the last one in brackets
        ("There is (C), although B is named later", None, False),
        ("The answer is B.", "B", True),
        ("A triangle has three sides, so I choose B, of course", None, False),  # "choose B, C and D such that"
        ("A triangle has three sides, so B it is", None, False),  # a letter that stands alone is for the judge
        ("B. $7", "B", True),
        ("I compute the total cost and get $7 for all", "B", True),
        ("It costs $7", None, False),  # texts of options count beyond five words
        ("I have no idea at all what that would cost", None, False),  # the authors guess
        ("<think>(A) or (C)?</think><answer>$7</answer>", "B", True),
        ("Answer:\nB", "B", True),
    ])  # fmt: skip


def test_mmmu_open() -> None:
    def right(response: str, answer: Any) -> bool:
        columns = {"question_type": "open", "options": {}, "answer": answer}
        extracted = BENCHMARKS["mmmu"].extract(response, columns)
        return extracted is not None and BENCHMARKS["mmmu"].score(extracted, columns)

    assert right("8.4", "8.4")
    assert right("<answer>$8.40</answer>", "8.4")
    assert right("The total is 12,000 dollars.", "12000")
    assert right("So we get x = 8.404", "8.4")  # two decimals
    assert not right("So we get x = 8.41", "8.4")
    assert not right("It is 18.4.", "8.4")
    assert right("The composer is Johann Sebastian Bach.", "Bach")
    assert right("8", ["8.0", "eight"])
    assert right("Result: eight", ["8.0", "eight"])
    assert not right("It is 3. So the answer is 4", "3.5")
    assert not right("<think>8.4", "8.4")
    assert not right("The answer is xy", "x")  # a single letter stands beside a space


def test_mmmu_pro() -> None:
    columns = {"question_type": "multiple-choice", "answer": "I",
               "options": dict(zip("ABCDEFGHIJ", map(str, range(100, 110))))}  # fmt: skip
    cases = [
        ("Let me think.\nAnswer: I", "I", True),
        ("Answer: A\nNo.\nAnswer: I", "I", True),
        ("Answer: $I$", "I", True),
        ("I think it is C because of the shadow", "C", False),  # a pronoun is no option
        ("I believe that nothing fits the picture", None, False),
        ("(I)", "I", True),
        ("<answer>I</answer>", "I", True),
        ("Adding it all up I am sure that we obtain 108 in total", "I", True),
    ]
    for name in ("mmmu_pro", "mmmu_pro_vision"):
        check(name, columns, cases)


def test_hallusionbench() -> None:
    yes = {"category": "VD", "figure_id": "1", "answer": "yes"}
    check("hallusionbench", yes, [
        ("Yes", "yes", True),
        ("Yes, there is no difference between them.", "yes", True),
        ("No, they differ.", "no", False),
        ("I looked for long, and all in all I would say that yes, they are equal.", "yes", True),
        ("There is no such line.", "no", False),
        ("They look the same. The answer is yes, although no two are alike.", "yes", True),
        ("<think>No?</think><answer>Yes</answer>", "yes", True),
        ("They are equal.", None, False),
        ("It says yes here and no there.", None, False),
        ("It cannot be determined.", "unclear", False),
        ("No one knows: yes.", None, False),
        ("yesterday", None, False),
    ])  # fmt: skip
    supplement = {"category": "VS", "figure_id": "0", "answer": "yes"}
    check("hallusionbench", supplement, [
        ("It is impossible to tell.", "unclear", True),  # no figure is shown: not to know is right
        ("No", "no", False),
    ])  # fmt: skip


def rows_of_hallusionbench() -> list[dict[str, Any]]:
    """Two sets: in each question 0 and 1 on figures 0 and 1; of the supplemented ones figure 0 is none."""
    return [
        {"category": category, "subcategory": "x", "set_id": "0", "figure_id": figure, "question_id": question}
        for category in ("VD", "VS")
        for figure in "01"
        for question in "01"
    ]


def test_metrics_of_hallusionbench_by_hand() -> None:
    rows = rows_of_hallusionbench()
    for row, correct in zip(rows, [1, 1, 1, 0, 1, 0, 1, 1]):
        row["correct"] = correct
    found = BENCHMARKS["hallusionbench"].metrics(rows)
    # figures: VD 0 right, VD 1 wrong, VS 1 right; questions: VD 0 right, VD 1 wrong, VS 0 right, VS 1 wrong
    assert found == pytest.approx({"mean": (0.75 + 2 / 3 + 0.5) / 3, "aAcc": 0.75, "fAcc": 2 / 3, "qAcc": 0.5})
    assert next(iter(found)) == "mean"
    twice = [{**row, "draw": draw} for draw in (0, 1) for row in rows]
    assert BENCHMARKS["hallusionbench"].metrics(twice) == pytest.approx(found)
    without = BENCHMARKS["hallusionbench"].metrics(rows[4:6])
    assert without == {"mean": 0.5, "aAcc": 0.5, "qAcc": 0.5}
    units = {BENCHMARKS["hallusionbench"].unit(row) for row in rows}
    assert units == {"VD_x_0", "VS_x_0"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_judge_is_asked_about_the_conclusion_and_its_reply_is_read(name: str) -> None:
    benchmark = benchmark_of(name)
    columns = {"question": "How many?", "question_type": "multi-choice", "answer_type": "text", "options": CATS,
               "answer": "B"}  # fmt: skip
    if name == "mathvista":
        columns["question_type"] = "multi_choice"
    if name == "mathverse_vo":
        columns["question"] += "\nChoices:\nA:a cat"
    asked = benchmark.extraction_prompt("<think>secret</think>Two of them, I guess.", columns)
    assert "How many?" in asked
    assert "Two of them, I guess." in asked
    assert "secret" not in asked
    if name == "hallusionbench":
        assert [benchmark.read_judgement(reply, columns) for reply in ("Yes.", "no", "Unclear", "maybe")] == [
            "yes", "no", "unclear", None]  # fmt: skip
        return
    assert "a cat" in asked
    assert benchmark.read_judgement("B", columns) == "B"
    assert benchmark.read_judgement("(B)", columns) == "B"
    assert benchmark.read_judgement("NONE", columns) is None


def test_a_judge_may_give_values() -> None:
    read = BENCHMARKS["mathvista"].read_judgement
    assert read("12,000", vista("12000", "integer")) == "12000"
    assert read("Answer: [1, 2]", vista("[1, 2]", "list")) == "[1, 2]"
    assert read("None", vista("1", "integer")) is None
    opened = {"question_type": "free-form", "options": {}}
    assert BENCHMARKS["mathverse_vo"].read_judgement("Final answer: 14 cm", opened) == "14 cm"
    assert BENCHMARKS["mathvision"].read_judgement("none", {"options": {}}) is None


def test_reward_of_mixed_benchmarks_has_trls_signature() -> None:
    columns = {
        "benchmark": ["mmstar", "mathvista", "hallusionbench"],
        "answer": ["B", "12000", "yes"],
        "options": [CATS, {}, None],
        "question_type": [None, "free_form", None],
        "answer_type": [None, "integer", None],
        "category": ["math", None, "VD"],
        "figure_id": [None, None, "0"],
        "trainer_state": object(),
    }
    messages = [[{"role": "assistant", "content": "<answer>B</answer>"}], "<answer>12,000</answer>", "No."]
    assert benchmark_reward(messages, **columns) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="benchmark is 'nope'; expected one of mathvista, mathvision"):
        benchmark_reward(["x"], benchmark=["nope"])
    with pytest.raises(ValueError, match="2 completions came with 1 benchmarks"):
        benchmark_reward(["x", "y"], benchmark=["mmstar"])


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Q?\nOptions: A: The suitcase is on the book., B: It is beneath the cat., C: no, D: A: yes", 4),
        ("Q?\nChoices:\n(A) 1\n(B) 2\n(C) 3", 3),
        ("Q?\nOptions:\nA. x\nB. y", 2),
        ("Is A: larger than B?", 0),
        ("Options: only one", 0),
    ],
)
def test_options_in_a_question(question: str, expected: int) -> None:
    assert len(options_in(question)) == expected


def test_conclusion() -> None:
    assert conclusion("plain") == "plain"
    assert conclusion("thoughts without opening</think> B") == "B"
    assert conclusion("<think>a <answer>B</answer>") == "<answer>B</answer>"
    assert conclusion("<think><answer>B</answer></think>") == "<answer>B</answer>"
    assert conclusion("<think>a") == ""


WORDS = st.text(string.ascii_lowercase, min_size=3, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=10, unique=True), st.integers(0, 9), st.integers(0, 7))
def test_every_option_is_found_however_it_is_written(texts: list[str], index: int, form: int) -> None:
    options = dict(zip(string.ascii_uppercase, texts))
    letter = list(options)[index % len(options)]
    ways = ["<answer>{0}</answer>", "\\boxed{{{0}}}", "({0})", "{0}. {1}", "<think>Or A?</think> The answer is {0}.",
            "<answer>{1}</answer>", "So the correct option is ({0}) {1}.", "**Answer: {0}**"]  # fmt: skip
    assert choose(ways[form].format(letter, options[letter]), options) == letter
    assert letter_of(options[letter], options) == letter


@settings(max_examples=60, deadline=None)
@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_the_table_of_levenshtein(ours: str, theirs: str) -> None:
    table = np.add.outer(np.arange(len(ours) + 1), np.arange(len(theirs) + 1))
    for row in range(1, len(ours) + 1):
        for column in range(1, len(theirs) + 1):
            change = table[row - 1, column - 1] + (ours[row - 1] != theirs[column - 1])
            table[row, column] = min(table[row - 1, column] + 1, table[row, column - 1] + 1, change)
    assert edit_distance(ours, theirs) == table[-1, -1]


CHOICE_OF = {"mathvista": "multi_choice", "mathverse_vo": "multi-choice"}
LOOPS = ["answer" + " " * 20_000 + "x", "1" * 20_000, "(" * 20_000, "the answer is " * 1500, "(A) or " * 3000,
         r"\boxed{" * 3000, "[1, " * 5000, "so it is " * 2000, "**" * 10_000]  # fmt: skip


LOOPED = {"mathvista", "mmmu_pro", "hallusionbench"}  # the others share their rules


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in LOOPED else [pytest.mark.slow]) for n in BENCHMARKS])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_response_that_fell_into_a_loop_is_read_in_no_time(name: str, loop: str) -> None:
    benchmark, started = BENCHMARKS[name], time.process_time()
    columns = {"question_type": CHOICE_OF.get(name, "multiple-choice"), "answer_type": "text", "options": CATS,
               "answer": "B", "category": "VD", "figure_id": "0"}  # fmt: skip
    assert benchmark.extract(loop, columns) is None
    answer = "yes" if name == "hallusionbench" else "B"
    assert benchmark.extract(f"{loop}.\n\nThe answer is {answer}.", columns) == answer
    for kind in ("list", "integer"):
        free = columns | {"question_type": "free_form", "answer_type": kind, "options": {}, "answer": "[1]"}
        extracted = benchmark.extract(loop, free)
        assert extracted is None or benchmark.score(extracted, free) is False
    assert time.process_time() - started < 10
