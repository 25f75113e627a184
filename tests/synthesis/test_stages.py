"""Prompts, and what is read from answers."""

import pytest

from avar_lightning.synthesis.inputs import Item, read_items
from avar_lightning.synthesis.stages import (
    Answer,
    Outcome,
    after_thinking,
    chain_of,
    load_stages,
    prompt_of,
    walk,
    woven,
)
from avar_lightning.synthesis.wire import read_answer


def refused(call, *args):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(*args)
    assert type(caught.value).__name__ == "_Rejected"
    return caught.value.reason


def test_the_shipped_prompts_ask_for_what_their_stages_need(prepare):
    stages = load_stages(prepare(1))
    asks = {name: set(stage.template.get_identifiers()) for name, stage in stages.items()}
    assert asks == {"describe": set(), "reason": {"question", "description"}, "anchor": {"question", "chain"}}
    assert [stage.sends_image for stage in stages.values()] == [True, False, False]
    assert len({stage.prompt_hash for stage in stages.values()}) == 3


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        ("describe", "Look at $description", r"asks for \$description; the prompt of stage describe may use"),
        ("reason", "Solve $question", r"lacks \$description"),
        ("reason", "Solve $question $description $chain", r"asks for \$chain"),
        ("anchor", "Weave $question", r"lacks \$chain"),
        ("anchor", "Weave $chain for $5", r"has a \$ that begins no placeholder; write \$\$"),
        ("anchor", None, "cannot be read"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_asked(server, prepare, tmp_path, stage, text, message):
    path = tmp_path / "prompt.md"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_stages(prepare(1, **{stage: {"prompt": str(path)}}))
    assert not server.requests


def test_dollars_in_a_question_are_left_alone(prepare):
    stages = load_stages(prepare(1))
    item = Item("here", question="What is $x$ if $chain costs $5?")
    assert "What is $x$ if $chain costs $5?" in prompt_of(stages["anchor"], item, chain="$y", description="", answer="")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>I see it.</think><answer>2</answer>", ("I see it.", "2")),
        ("<think>\nI see\n\nit.\n</think>\n\n<answer> 2 </answer>\n", ("I see\n\nit.", "2")),
        ("I see it.</think><answer>2</answer>", ("I see it.", "2")),
        ("<think>Easy.</think>\n<think>I see it.</think><answer>2</answer>", ("I see it.", "2")),
        ("Sure:\n```\n<think>I see it.</think><answer>2</answer>\n```", ("I see it.", "2")),
        ("<think>a < b and b > c</think><answer>x > 3</answer>", ("a < b and b > c", "x > 3")),
    ],
)
def test_anchored_chains_are_read(content, expected):
    assert woven(content) == expected


@pytest.mark.parametrize(
    "content",
    [
        "",
        "I see it. <answer>2</answer>",
        "<think>I see it.</think> 2",
        "<think>I see it.</think><answer></answer>",
        "<think> </think><answer>2</answer>",
        "<think>I see it.</think><answer>2</answer> Done.",
        "<think>I see it.</think> So it is <answer>2</answer>",
        "<think>I see <answer>3</answer> it.</think><answer>2</answer>",
        "<think>Easy.</think>I see it.</think><answer>2</answer>",
        "<think>I see it.<answer>2</answer></think>",
    ],
)
def test_what_is_not_an_anchored_chain_is_rejected(content):
    assert refused(woven, content) == "format"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("It is 2. <answer>2</answer>"), ("It is 2.", "2")),
        (Answer("So \\boxed{2}.", reasoning="One and one."), ("One and one.\n\nSo \\boxed{2}.", "2")),
        (Answer("<think>One and one.</think><answer>2</answer>"), ("One and one.", "2")),
        (Answer("One and one.</think>\n<answer>2</answer>"), ("One and one.", "2")),
        (Answer("<answer>3</answer> no, <answer>2</answer>"), ("3 no,", "2")),
    ],
)
def test_chains_are_read(answer, expected):
    assert chain_of(answer) == expected


def test_a_chain_without_an_answer_is_rejected():
    assert refused(chain_of, Answer("It is two.", reasoning="<answer>2</answer>")) == "format"
    assert refused(chain_of, Answer("<answer> </answer>")) == "format"


def test_thinking_is_no_description():
    assert after_thinking("A red cube.") == "A red cube."
    assert after_thinking("<think>Hm.</think>\nA red cube.") == "A red cube."


def test_an_unusable_item_ends_before_any_call(prepare):
    config = prepare(1)
    steps = walk(Item("here", problem="it has no image"), load_stages(config), config.filters)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == Outcome("input", "it has no image", tokens={})


def test_a_tolerance_that_is_none_rejects_its_sample(prepare):
    config = prepare(1, fields={"tolerance": "some"})
    (item,) = read_items(config)
    steps = walk(item, load_stages(config), config.filters)
    next(steps)
    steps.send(Answer("A square."))
    with pytest.raises(StopIteration) as end:
        steps.send(Answer("None. <answer>0</answer>"))
    assert end.value.value.reason == "input"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"type": "text", "text": "A "}, {"type": "thinking"}, {"type": "text", "text": "cube."}]', "A cube."),
        ('"half \\ud83d"', "half ?"),
    ],
)
def test_odd_texts_are_read(prepare, content, expected):
    config = prepare(1)
    call = next(walk(next(read_items(config)), load_stages(config), config.filters))
    assert read_answer(f'{{"choices": [{{"message": {{"content": {content}}}}}]}}', call).content == expected


def test_surplus_in_an_answer_is_ignored(prepare):
    text = '{"choices": [{"message": {"content": "Hi", "tool_calls": null}, "logprobs": 1}], "usage": {"x": 1}, "z": 1}'
    config = prepare(1)
    (item,) = read_items(config)
    call = next(walk(item, load_stages(config), config.filters))
    answer = read_answer(text, call)
    assert (answer.content, answer.finish_reason, answer.estimated) == ("Hi", "stop", True)
