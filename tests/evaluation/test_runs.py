"""Whole runs of train.py: killed at any moment, and on several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.samples import write_benchmark

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
COUNT = 25  # odd: on two processes one sample fills up
FILES = ("samples.jsonl", "results.json", "results.csv", "results.md")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_benchmark(tmp_path_factory.mktemp("shards"), "mmstar", COUNT)


def start(shards: str, output: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), "test", "--config", str(ROOT / "configs/eval.yaml")]
    command += ["--data.init_args.test", shards, "--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu"]
    command += ["--trainer.callbacks.init_args.output", str(output), "--trainer.callbacks.init_args.max_new_tokens"]
    command += ["32", "--data.init_args.batch_size", "1", "--trainer.devices", "1", *options]
    log = (output.parent / f"{output.name}.log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def finish(shards: str, output: Path, *options: str) -> Path:
    assert start(shards, output, *options).wait(600) == 0, (output.parent / f"{output.name}.log").read_text()[-3000:]
    return output


@pytest.fixture(scope="module")
def whole(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(shards, tmp_path_factory.mktemp("whole") / "out")


def rows_of(folder: Path) -> dict[str, Any]:
    return {row["id"]: row for row in map(json.loads, (folder / "samples.jsonl").read_text().splitlines())}


def answers(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("answers_*.jsonl"))


def test_killed_again_and_again(shards: str, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for wanted in (3, 11, 18):
        process = start(shards, output)
        while answers(output) < wanted:
            assert process.poll() is None, (tmp_path / "out.log").read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert wanted <= answers(output) < COUNT
    finish(shards, output)
    assert (output / "answers_0.jsonl").read_text() == (whole / "answers_0.jsonl").read_text()
    for name in FILES:
        assert (output / name).read_text() == (whole / name).read_text(), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one(strategy: str, shards: str, whole: Path, tmp_path: Path) -> None:
    options = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    output = tmp_path / "out"
    process = start(shards, output, *options)
    while answers(output) < 5:
        assert process.poll() is None, (tmp_path / "out.log").read_text()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(shards, output, *options)
    assert len(list(output.glob("answers_*.jsonl"))) == 2
    assert answers(output) == COUNT
    ours, expected = rows_of(output), rows_of(whole)
    assert list(ours) == list(expected)
    for name, row in expected.items():
        assert ours[name]["response"] == row["response"]
        assert ours[name]["extracted"] == row["extracted"]
        for score in ("vas", "vas_ratio_of_means", "vas_ratio_of_means_response"):
            assert ours[name][score] == pytest.approx(row[score], rel=1e-3)
    # The weights are the same, however they are shared, so one process goes on where two were.
    before = (output / "results.csv").read_text()
    finish(shards, output)
    assert answers(output) == COUNT
    assert (output / "results.csv").read_text() == before
