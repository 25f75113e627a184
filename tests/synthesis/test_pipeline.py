"""The three stages against a real HTTP server: what is asked, kept, rejected and written."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from avar_lightning.data import find_shards
from avar_lightning.rewards import format_reward
from avar_lightning.synthesis import FilterConfig, SynthesisConfig, preview, synthesize
from tests.synthesis.conftest import output_bytes, rejected, written
from tests.synthesis.server import script


def test_each_question_goes_through_three_stages_into_shards(server, prepare):
    config = prepare(5, samples_per_shard=2, system_prompt="Be kind.")
    report = synthesize(config)
    assert (report.read, report.kept, report.left, report.budget) == (5, 5, 0, "")
    assert report.shards == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [shard.samples for shard in find_shards(config.output)] == [2, 2, 1]
    sample = written(config)["q3"]
    system, user, assistant = sample.messages
    assert system == {"role": "system", "content": "Be kind."}
    assert user["content"][0] == {"type": "image"}
    assert user["content"][1]["text"] == "Item 3: how many dots?"
    assert assistant["content"] == script("anchor", 3).replace("\n", "")
    assert format_reward([assistant["content"]]) == [1.0]
    assert sample.answer == 3
    assert sample.images[0].getpixel((0, 0)) == (3, 0, 0)


def test_each_stage_is_asked_with_what_the_last_one_gave(server, prepare):
    synthesize(prepare(1))
    (describe,), (reason,), (anchor,) = (server.asked(name) for name in ("describe", "reason", "anchor"))
    image, text = describe["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    for step in ("Global scan", "Decomposition", "Linking", "Synthesis"):
        assert step in text["text"]
    assert "A plain square, number 0." in reason["messages"][0]["content"]
    assert "Item 0: how many dots?" in reason["messages"][0]["content"]
    assert "There are 0 dots, by" in anchor["messages"][0]["content"]
    assert "A plain square" not in anchor["messages"][0]["content"]


def test_every_stage_has_its_own_settings(server, prepare):
    config = prepare(
        1,
        describe={"temperature": 0.1, "max_tokens": 77, "top_p": 0.5},
        reason={"extra": {"chat_template_kwargs": {"thinking": True}}, "temperature": None, "image": True},
        anchor={"max_tokens_field": "max_completion_tokens"},
    )
    synthesize(config)
    describe, reason, anchor = (server.asked(name)[0] for name in ("describe", "reason", "anchor"))
    assert (describe["temperature"], describe["max_tokens"], describe["top_p"]) == (0.1, 77, 0.5)
    assert reason["chat_template_kwargs"] == {"thinking": True}
    assert "temperature" not in reason
    assert reason["messages"][0]["content"][0]["type"] == "image_url"
    assert anchor["max_completion_tokens"] == 200
    assert "max_tokens" not in anchor


def test_seeds_differ_by_question_and_follow_the_configured_one(server, prepare):
    def seeds(output, **options):
        server.requests.clear()
        synthesize(prepare(3, output=output, **options))
        return sorted(body.get("seed", -1) for body in server.requests)

    one = seeds("one", seed=1)
    assert len(set(one)) == 9
    assert seeds("again", seed=1) == one
    assert not set(seeds("two", seed=2)) & set(one)
    assert seeds("none", seed=None) == [-1] * 9


def test_provenance_goes_with_each_sample(server, prepare, tmp_path):
    prompt = tmp_path / "my.md"
    prompt.write_text("Weave $chain for $question, worth $$5.")
    config = prepare(2, anchor={"prompt": str(prompt)}, fields={"task": "dots"})
    synthesize(config)
    assert "Weave There are" in server.asked("anchor")[0]["messages"][0]["content"]
    assert "worth $5" in server.asked("anchor")[0]["messages"][0]["content"]
    columns = written(config)["q1"].columns
    provenance = columns["synthesis"]
    assert columns["task"] == "dots"
    assert provenance["models"] == {"describe": "describe", "reason": "reason", "anchor": "anchor"}
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in provenance["prompts"].values())
    assert provenance["scores"]["anchors"] == 4
    assert provenance["scores"]["spread"] == 1.0
    assert provenance["tokens"]["reason"] == {"prompt": 100, "completion": 50}
    shipped = prepare(2, output="shipped")
    synthesize(shipped)
    theirs = written(shipped)["q1"].columns["synthesis"]["prompts"]
    assert theirs["reason"] == provenance["prompts"]["reason"]
    assert theirs["anchor"] != provenance["prompts"]["anchor"]


def test_a_wrong_chain_is_not_anchored(server, prepare):
    server.texts["reason", 1] = "Hm. <answer>77</answer>"
    server.texts["reason", 2] = "I cannot say."
    config = prepare(4)
    report = synthesize(config)
    assert (report.kept, report.rejected["agreement"], report.rejected["format"]) == (2, 1, 1)
    assert len(server.asked("anchor")) == 2
    assert rejected(config)["q1"]["reason"] == "agreement: reason: answers '77', the gold answer is 1"
    assert rejected(config)["q1"]["response"] == "Hm.\n<answer>77</answer>"
    assert rejected(config)["q1"]["where"] == "questions.jsonl:2"
    assert set(written(config)) == {"q0", "q3"}


def test_every_filter_counts_and_explains(server, prepare):
    def anchored(chain, item):
        return f"<think>{chain}</think><answer>{item}</answer>"

    long = " ".join(f"step{i}" for i in range(40))
    server.texts |= {
        ("anchor", 0): anchored("I look at the dots. I see none.", 0),
        ("anchor", 1): anchored("In the picture I see one dot, one dot, one dot. " * 9, 1),
        ("anchor", 2): anchored(f"I see two. {long}. As the description says, looking back at it, two.", 2),
        ("anchor", 3): anchored(f"{long}. There are three.", 3),
        ("anchor", 4): anchored(f"I see four dots in the picture. I see them. {long}", 4),
        ("anchor", 5): anchored(f"I see them. {long}. I see five.", 55),
        ("anchor", 6): "I see six dots. <answer>6</answer>",
    }
    config = prepare(8)
    report = synthesize(config)
    reasons = {id: row["reason"] for id, row in rejected(config).items()}
    assert reasons == {
        "q0": "length: 8 words, fewer than 20",
        "q1": "repetition: share 0.8804 of rows of 8 words came before, at most 0.2 may",
        "q2": "mention: says 'the description', which gives away that it was written from a text",
        "q3": "anchors: 0 return(s) to the image, fewer than 2",
        "q4": "spread: returns to the image in 1 of 3 parts, fewer than 2",
        "q5": "agreement: anchor: answers '55', the gold answer is 5",
        "q6": "format: anchor: it does not end with <think>…</think><answer>…</answer>",
    }
    assert report.kept == 1
    assert {name: count for name, count in report.rejected.items() if count} == dict.fromkeys(
        ["length", "repetition", "mention", "anchors", "spread", "agreement", "format"], 1
    )
    told = str(report)
    assert "kept                         1  12.5%" in told
    for name in ("length", "repetition", "mention", "anchors", "spread", "agreement", "format"):
        assert re.search(rf"^  {name} +1  ", told, re.MULTILINE)
    assert json.loads((Path(config.output) / "report.json").read_text())["kept"] == 1


def test_other_filters_cost_nothing(server, prepare):
    strict = prepare(3, filters={"min_anchors": 5})
    assert synthesize(strict).kept == 0
    before = len(server.requests)
    assert synthesize(prepare(3)).kept == 3
    assert len(server.requests) == before
    assert not rejected(strict)


def test_a_question_is_asked_once_and_a_response_kept_once(server, prepare):
    config = prepare(3)
    path = Path(config.input)
    lines = path.read_text().splitlines()
    again = json.dumps(json.loads(lines[1]) | {"id": "again"})
    path.write_text("\n".join([*lines, again]) + "\n")
    server.texts["reason", 2] = "Two. <answer>2</answer>"
    server.texts["anchor", 2] = script("anchor", 1)
    report = synthesize(prepare_like(config, filters={"agreement": False}))
    assert rejected(config)["again"]["reason"] == "repeated: the image and question of an earlier sample"
    assert rejected(config)["q2"]["reason"] == "duplicate: the response of an earlier sample"
    assert (report.rejected["repeated"], report.rejected["duplicate"], report.kept) == (1, 1, 2)
    assert len(server.asked("describe")) == 3
    kept = synthesize(prepare_like(config, filters={"agreement": False, "duplicate_responses": False}))
    assert kept.kept == 3


def prepare_like(config, *, filters):
    return replace(config, filters=FilterConfig(**filters))


def test_questions_about_one_image_share_its_description(server, prepare):
    config = prepare(1)
    path = Path(config.input)
    rows = [json.loads(path.read_text()) | {"question": f"Item {n}: how many dots?", "answer": n} for n in range(4)]
    path.write_text("".join(json.dumps(row | {"id": f"q{n}"}) + "\n" for n, row in enumerate(rows)))
    assert synthesize(config).kept == 4
    assert [len(server.asked(name)) for name in ("describe", "reason", "anchor")] == [1, 4, 4]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_what_a_reasoning_model_thinks_is_part_of_the_chain_only(server, prepare, name):
    for model in ("describe", "anchor"):
        server.texts[model, 0] = {"content": script(model, 0), name: "The user wants words."}
    server.texts["reason", 0] = {"content": "So it is <answer>0</answer>", name: "Zero dots, I think. Wait, yes."}
    config = prepare(1)
    assert synthesize(config).kept == 1
    anchor = server.asked("anchor")[0]["messages"][0]["content"]
    assert "Zero dots, I think. Wait, yes.\n\nSo it is" in anchor
    assert "The user wants words" not in server.asked("reason")[0]["messages"][0]["content"]
    assert "The user wants words" not in written(config)["q0"].messages[-1]["content"]


def test_options_are_shown_and_judged(server, prepare):
    config = prepare(1, fields={"options": ["one dot", "no dot"], "answer": "B"})
    server.texts["reason", 0] = "None. <answer>no dot</answer>"
    server.texts["anchor", 0] = script("anchor", 0).replace("<answer>0", "<answer>(B)")
    assert synthesize(config).kept == 1
    asked = "Item 0: how many dots?\nA. one dot\nB. no dot"
    assert asked in server.asked("reason")[0]["messages"][0]["content"]
    assert written(config)["q0"].messages[0]["content"][1]["text"] == asked


def test_the_number_of_requests_in_flight_is_held(server, prepare):
    server.delay = 0.03
    synthesize(prepare(20, concurrency=3))
    assert server.most == 3


def test_the_output_depends_on_the_answers_alone(server, prepare):
    one, other = prepare(12, concurrency=1), prepare(12, output="other", concurrency=9)
    server.texts["reason", 5] = "<answer>9</answer>"
    synthesize(one)
    server.delay = 0.01
    synthesize(other)
    assert output_bytes(one.output) == output_bytes(other.output)
    assert len(output_bytes(one.output)) == 3


def test_a_limit_takes_the_first_samples_and_more_come_later(server, prepare):
    assert synthesize(prepare(6, limit=2)).read == 2
    assert len(server.requests) == 6
    report = synthesize(prepare(6))
    assert (report.kept, len(server.requests)) == (6, 18)


def test_a_preview_asks_nobody(server, prepare):
    text = preview(prepare(3))
    assert not server.requests
    assert "Item 0: how many dots?" in text
    assert "[the description]" in text
    assert "[the chain]" in text
    assert "at most 9 for 3 samples" in text


def test_shards_of_somebody_else_are_not_replaced(server, prepare):
    config = prepare(2)
    folder = Path(config.output)
    folder.mkdir()
    (folder / "shard-000000.tar").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="already holds 1 shard"):
        synthesize(config)
    assert synthesize(prepare(2, overwrite=True)).kept == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"stage": {"base_url": "localhost:8000"}}, "base_url='localhost:8000'"),
        ({"stage": {"base_url": "http://me:secret@host/v1"}}, "has a key or password"),
        ({"stage": {"base_url": "http://host/v1?api_key=secret"}}, "has a key or password"),
        ({"stage": {"extra": {"api_key": "secret"}}}, "extra has 'api_key'"),
        ({"stage": {"api_key_variable": "sk-secret"}}, "no name of an environment variable"),
        ({"stage": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"filters": {"anchors": ["("]}}, r"filters\.anchors has '\('"),
        ({"filters": {"min_words": 9, "max_words": 8}}, "min_words=9"),
        ({"filters": {"min_parts": 4}}, "min_parts=4 of anchor_parts=3"),
        ({"filters": {"max_repetition": 1.5}}, "max_repetition=1.5"),
    ],
)
def test_bad_settings_are_refused(prepare, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare(1, **options)
    assert "secret" not in str(caught.value)


def test_a_config_holds_no_key(prepare, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-hidden")
    config: SynthesisConfig = prepare(1, stage={"api_key_variable": "MY_KEY"})
    assert "sk-hidden" not in repr(config)
    assert config.stages.describe.api_key == "sk-hidden"
