import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_lightning.mathematics import same_expressions
from avar_lightning.rewards import accuracy_reward, extract_answer, format_reward
from avar_lightning.rewards.quantity import parse_quantity, parse_tolerance


def reward(given_answer, gold, **columns):
    return accuracy_reward([f"<answer>{given_answer}</answer>"], [gold], **{k: [v] for k, v in columns.items()})[0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> or rather <answer> 2 </answer>", "2"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("so it is \\boxed{\\frac{1}{2}} as said", "\\frac{1}{2}"),
        ("\\boxed{open", None),
        ("<answer>open", None),
        ("<answer>" * 20_000, None),
        ("</answer><answer>", None),
        ("", None),
    ],
)
def test_extract_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("4", 4, 1.0),
        ("4.0", "4", 1.0),
        ("Yes", "yes", 1.0),
        ("Yes.", True, 1.0),
        ("no", True, 0.0),
        ("40", "4", 0.0),
        ("", "4", 0.0),
        ("nan", "4", 0.0),
        ("**Blue circle**", "blue circle", 1.0),
        ("circle blue", "blue circle", 0.0),
        ("on", "no", 0.0),  # as products of letters they would be equal
        ("\\text{red}", "red", 1.0),
    ],
)
def test_text_and_plain_numbers(answer, gold, right):
    assert accuracy_reward([f"<answer>{answer}</answer>"], [gold], other_column=["ignored"]) == [right]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("1,250 cm", "1250", 1.0),
        ("5 cm", "5 mm", 0.0),
        ("5 centimeters", "5 cm", 1.0),
        ("60^\\circ", "60 degrees", 1.0),
        ("60°", "60", 1.0),
        ("$5", "5 dollars", 1.0),
        ("2.5 × 10^3", "2500", 1.0),
        ("2.5e3", 2500, 1.0),
        ("-3", "3", 0.0),
        ("−3", "-3", 1.0),
        ("3/4", "0.75", 1.0),
        ("\\frac{3}{4}", "0.75", 1.0),
        ("12 cm^2", "12 cm²", 1.0),
        ("12 square cm", "12 cm", 0.0),
        ("1/0", "1", 0.0),
        ("1e999", "5", 0.0),
        ("2 x 10^400", "red", 0.0),
        ("5 to 6", "5", 0.0),
        ("5 cm or 6 cm", "5", 0.0),
        ("2 is wrong", "2", 0.0),
        ("5 degrees Celsius", "5", 1.0),
        (r"12\frac{1}{2}", "12.5", 1.0),
        (r"12\frac{1}{2}", "60.5", 0.0),
        ("60.5", r"12\frac{1}{2}", 0.0),
        ("12.5", r"12\frac{1}{2}", 1.0),
        (r"-12\dfrac{1}{2} cm", "-12.5", 1.0),
        (r"-12 \frac{1}{2}", "-11.5", 0.0),
        ("12 1/2", "12.5", 1.0),
        ("12 1/2", "60.5", 0.0),
        (r"1\frac{1}{4}", "2.75", 0.0),
        (r"\frac{1}{2}3", "0.5", 0.0),
        (r"1.5\frac{1}{2}", "2", 0.0),
        (r"1\,200\,000", "1200000", 1.0),
        ("1{,}200{,}000", "1,200,000", 1.0),
        (r"1\,200\,000", "1", 0.0),
        (r"5\,\text{cm}", "5 cm", 1.0),
        ("–12.5", "-12.5", 1.0),
        ("–12.5", "12.5", 0.0),
        ("1.2 million", "1200000", 1.0),
        ("1.2 million people", "1.2", 1.0),  # as of a unit: the question may count in millions
        ("1.2 million", "1,200 thousand", 1.0),
        ("1.2 million", "1.2 billion", 0.0),
        ("1.2 million", "1200", 0.0),
    ],
)
def test_numbers_with_units(answer, gold, right):
    assert reward(answer, gold) == right


@pytest.mark.parametrize(
    ("answer", "gold", "tolerance", "right"),
    [
        ("3.1", "3.14159", None, 0.0),
        ("3.1", "3.14159", 0.05, 1.0),
        ("3.1", "3.14159", "2%", 1.0),
        ("3.1", "3.14159", "1%", 0.0),
        ("[3.1, 2.0]", [3.14159, 2], "2%", 1.0),
    ],
)
def test_tolerance(answer, gold, tolerance, right):
    assert reward(answer, gold, tolerance=tolerance) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1.0),
        ("b", 1.0),
        ("(B)", 1.0),
        ("B.", 1.0),
        ("B. a cat", 1.0),
        ("B) something else", 1.0),
        ("The answer is (B)", 1.0),
        ("Option B: a cat", 1.0),
        ("a cat", 1.0),
        ("A", 0.0),
        ("a dog", 0.0),
        ("B. a dog", 0.0),  # the letter of one option with the text of another
        ("Z", 0.0),
        ("A cat or a dog", 0.0),
        ("AB", 0.0),
        ("B, A", 0.0),
        ("A, B", 0.0),
        ("B) A)", 0.0),
    ],
)
@pytest.mark.parametrize("gold", ["B", "(B)", "a cat"])
@pytest.mark.parametrize(
    "options", [["a dog", "a cat", "a cow"], {"A": "a dog", "B": "a cat"}, ["A. a dog", "B. a cat"]]
)
def test_options(answer, gold, options, right):
    assert reward(answer, gold, options=options) == right


@pytest.mark.parametrize(
    ("answer", "right"), [("C", 1.0), ("(c) 12", 1.0), ("Answer: C", 1.0), ("D", 0.0), ("Cat", 0.0)]
)
def test_a_letter_without_options(answer, right):
    assert reward(answer, "C") == right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("[1, 2, 3]", [1, 2, 3], 1.0),
        ("1; 2; 3", ["1", "2", "3"], 1.0),
        ("red and blue", ["red", "blue"], 1.0),
        ("2, 1, 3", [1, 2, 3], 0.0),
        ("1, 2", [1, 2, 3], 0.0),
        ("", [1], 0.0),
    ],
)
def test_lists(answer, gold, right):
    assert reward(answer, gold) == right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("(x+1)^2", "x^2+2x+1", 1.0),
        ("(x+1)^2", "x^2+2x+2", 0.0),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", 1.0),
        ("$2\\pi r$", "2\\pi r", 1.0),
        ("50\\%", "\\frac{1}{2}", 1.0),
        ("60\\%", "0.5", 0.0),
    ],
)
def test_mathematics(answer, gold, right):
    assert reward(answer, gold) == right


@pytest.mark.slow
def test_what_takes_for_ever_is_stopped_and_the_next_pair_is_compared(caplog):
    start = time.monotonic()
    assert same_expressions([("9^{9^{9^{9}}}+x", "3x^2"), ("2x", "x+x")], time_limit=4.0) == [False, True]
    assert time.monotonic() - start < 60
    assert same_expressions([("2" * 500, "2")]) == [False]


def test_python_in_an_answer_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    strange = f"__import__('pathlib').Path('{marker}').touch()+1"
    assert reward(strange, "1+1") == 0.0
    assert same_expressions([(strange, "1+1")]) == [False]
    assert not marker.exists()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.one_of(st.text(alphabet="abcxyz ()[],.", max_size=20), st.booleans(), st.none()))
def test_a_strange_answer_is_wrong_and_never_an_exception(text, gold):
    assert reward(text, gold) in (0.0, 1.0, None)
    assert reward(text, "B", options=["a", text]) in (0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789.,eE+-/%$°cm^{}\\ x×", max_size=25))
def test_any_quantity_is_read_or_refused(text):
    found = parse_quantity(text)
    assert found is None or found.value == found.value


@given(st.integers(-(10**9), 10**9))
def test_a_number_equals_itself_however_it_is_written(number):
    assert reward(f"{number:,}", number) == reward(f"{number}.0", number) == reward(f"${number}$", str(number)) == 1.0


def test_samples_without_an_answer_have_no_reward_and_messages_are_read():
    message = [{"role": "assistant", "content": [{"type": "text", "text": "<answer>4</answer>"}]}]
    assert accuracy_reward([message, "<answer>4</answer>"], [4, None]) == [1.0, None]


def test_missing_answers_and_bad_tolerances_are_errors():
    with pytest.raises(ValueError, match="2 completions came with 1 answers"):
        accuracy_reward(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="tolerance is 'much'"):
        parse_tolerance("much")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>a\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a</think><answer>b</answer> done", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think><answer>b</answer></think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, right):
    assert format_reward([text]) == [right]
