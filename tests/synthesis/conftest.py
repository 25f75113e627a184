import json
from pathlib import Path

import pytest

from avar_lightning.data import parse_sample, read_shard
from avar_lightning.synthesis import FilterConfig, StageConfig, StagesConfig, SynthesisConfig
from tests.synthesis.server import ScriptedServer, write_questions


def make_config(url, input, output, *, stage=None, describe=None, reason=None, anchor=None, filters=None, **options):
    """A synthesis against a server; options of all stages, of each, of the filters, and others."""
    own = {"describe": describe or {}, "reason": reason or {}, "anchor": anchor or {}}
    stages = {
        name: StageConfig(**({"model": name, "base_url": url, "max_tokens": 200} | (stage or {}) | each))
        for name, each in own.items()
    }
    defaults = {"concurrency": 4, "patience": 20.0, "max_wait": 0.02, "progress": False}
    return SynthesisConfig(
        str(input), str(output), StagesConfig(**stages), filters=FilterConfig(**(filters or {})), **(defaults | options)
    )


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture
def prepare(server, tmp_path):
    """Makes a configuration for so many questions."""

    def prepare(count=4, *, output="out", fields=None, **options):
        path = write_questions(tmp_path / "in", count, **(fields or {}))
        return make_config(server.url, path, tmp_path / output, **options)

    return prepare


def written(config):
    """Samples of the shards, by id."""
    shards = sorted(Path(config.output).glob("*.tar"))
    samples = [parse_sample(raw) for shard in shards for raw in read_shard(shard)]
    return {sample.id: sample for sample in samples}


def rejected(config):
    """Lines of rejected.jsonl, by id."""
    lines = (Path(config.output) / "rejected.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def output_bytes(folder):
    """What must not depend on how the run went."""
    names = ("*.tar", "manifest.json", "rejected.jsonl")
    return {path.name: path.read_bytes() for name in names for path in sorted(Path(folder).glob(name))}
