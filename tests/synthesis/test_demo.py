"""The demo teacher through the whole pipeline, the command line, and the configurations that are shipped."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from avar_lightning.commands import main
from avar_lightning.commands.synthesize import synthesis_parser
from avar_lightning.data import ShardWriter
from avar_lightning.data.demo import demo_samples
from avar_lightning.synthesis import DemoConfig, synthesize
from avar_lightning.synthesis.demo_teacher import DemoTeacher
from avar_lightning.synthesis.filters import FilterConfig, first_objection, score
from avar_lightning.synthesis.stages import load_stages
from tests.synthesis.conftest import make_config, output_bytes, rejected, written

CONFIGS = Path(__file__).parents[2] / "configs" / "synthesis"
DEMO = str(CONFIGS / "demo.yaml")


def anchored(count, seed=0, split="train"):
    samples = demo_samples(count, style="anchored", hint_rate=0.8, seed=seed, split=split)
    return {sample.id: sample for sample in samples}


def run(*arguments):
    return main(["synthesize", "--config", DEMO, "--progress", "false", *map(str, arguments)])


def test_the_demo_ends_with_the_responses_of_its_anchored_style(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--output", out) == 0
    config = make_config("demo", "demo", out)
    found, expected = written(config), anchored(60)
    lost = {row["reason"].partition(":")[0] for row in rejected(config).values()}
    assert lost <= {"repeated"}  # pictures of one angle may be the same by chance
    assert len(found) + len(rejected(config)) == 60
    assert len(found) > 55
    for id, sample in found.items():
        assert sample.messages == expected[id].messages
        assert sample.images[0].tobytes() == expected[id].images[0].tobytes()
        assert sample.columns.pop("synthesis")["models"] == {name: name for name in ("describe", "reason", "anchor")}
        assert sample.columns == expected[id].columns
    told = capsys.readouterr().out
    assert "read                        60" in told
    assert str(out) in told
    assert json.loads((out / "report.json").read_text())["kept"] == len(found)


def test_every_demo_response_passes_the_default_filters():
    filters = FilterConfig()
    for sample in anchored(300, seed=3).values():
        chain = sample.messages[-1]["content"].removeprefix("<think>").partition("</think>")[0]
        assert first_objection(chain, score(chain, filters), filters) is None, chain


def test_demo_shards_are_recognised_too(tmp_path):
    with ShardWriter(tmp_path / "in") as writer:
        for sample in demo_samples(10, style="direct", hint_rate=0.8, seed=4, split="val"):
            writer.write(sample)
    config = make_config("demo", tmp_path / "in", tmp_path / "out", demo=DemoConfig(10, seed=4, split="val"))
    config = replace(config, filters=FilterConfig(duplicate_responses=False))
    assert synthesize(config).kept == 10
    expected = anchored(10, seed=4, split="val")
    assert all(sample.messages == expected[id].messages for id, sample in written(config).items())


def test_the_teacher_says_what_it_does_not_know(tmp_path):
    with ShardWriter(tmp_path / "in") as writer:
        for sample in demo_samples(2, style="direct", hint_rate=0.8, seed=9, split="train"):
            writer.write(sample)
    with pytest.raises(RuntimeError, match=r"answered 400 .*samples of demo\.seed=0, demo\.split=train"):
        synthesize(make_config("demo", tmp_path / "in", tmp_path / "out"))
    status, body = DemoTeacher(DemoConfig())({"model": "gpt", "messages": [{"role": "user", "content": "Hi"}]})
    assert status == 404
    assert "describe, reason, anchor" in body["error"]["message"]


def test_options_go_over_the_file_and_runs_go_on(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--output", out, "--demo.num_samples", 12, "--stages.anchor.price_output", 2.0, "--max_requests", 20]
    assert run(*arguments) == 0
    assert "max_requests=20 is spent" in capsys.readouterr().out
    assert run(*arguments[:-1], 1000) == 0
    told = capsys.readouterr().out
    assert "read                        12" in told
    assert "left" not in told
    assert "cost" in told
    whole = tmp_path / "whole"
    assert run("--output", whole, "--demo.num_samples", 12) == 0
    assert output_bytes(out) == output_bytes(whole)


def test_a_dry_run_shows_the_prompts(tmp_path, capsys):
    assert run("--output", tmp_path / "out", "--dry_run", "true") == 0
    told = capsys.readouterr().out
    assert "What is in B? Note: it may be empty." in told
    assert "at most 180 for 60 samples" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nope", "1"], "unrecognized arguments: --nope 1"),
        (["--concurrency", "many"], "concurrency"),
        (["--stages.reason.max_tokens", "many"], "stages.reason.max_tokens"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as end:
        run("--output", tmp_path, *arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert sentence in said
    assert "\n" not in said


def test_unknown_keys_in_a_file_are_one_sentence(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("stages:\n  describe:\n    modell: x\n")
    with pytest.raises(SystemExit) as end:
        run("--config", path)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "modell" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input", "/no/such.jsonl"], "no file /no/such.jsonl"),
        (["--stages.anchor.api_key_variable", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--stages.anchor.prompt", "/no/such.md"], "cannot be read"),
        (["--concurrency", "0"], "concurrency is 0"),
        (["--stages.reason.base_url", "nowhere"], "base_url='nowhere'"),
    ],
)
def test_faults_of_input_and_environment_are_one_sentence(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert run("--output", tmp_path / "out", *arguments) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert sentence in said
    assert "\n" not in said


def test_help_tells_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        main(["synthesize", "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    for words in ("--stages.anchor.temperature", "--filters.min_anchors", "Fewest returns to the image in the chain"):
        assert words in told


def test_a_missing_client_is_said_with_its_cure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert run("--output", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said == (
        "error: avar synthesize needs the openai client; install it with: pip install 'avar-lightning[synthesis]'\n"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_understood(path):
    parser = synthesis_parser()
    parsed = parser.instantiate_classes(parser.parse_args(["--config", str(path)]))
    given = yaml.safe_load(path.read_text())
    assert parsed.stages.reason.model == given["stages"]["reason"]["model"]
    assert parsed.filters.min_anchors == given.get("filters", {}).get("min_anchors", 2)
    assert set(load_stages(parsed)) == {"describe", "reason", "anchor"}
