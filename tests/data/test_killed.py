"""Runs that are killed and go on: every sample once, and the losses of a run that nobody stopped."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data import killed

SAMPLES, BATCH = 48, 4  # an epoch has 12 steps


def run(shards: str, folder: Path, *options: str, processes: int = 1, ends: int = 0) -> None:
    """Train in processes of their own; forked, as starting Python anew would take most of the time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def work(rank: int) -> None:
        if processes > 1:  # what torchrun tells
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sys.argv = ["killed.py", shards, str(folder), *options]
        killed.main()

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=work, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in started] == [ends] * processes


def diary(folder: Path, processes: int = 1) -> dict[int, dict[str, Any]]:
    """What each step saw, the last time it was made, over all processes."""
    steps: dict[int, dict[str, Any]] = {}
    for rank in range(processes):
        latest = {}
        for line in (folder / f"{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            latest[entry["step"]] = entry
        for step, entry in latest.items():
            known = steps.setdefault(step, {"epoch": entry["epoch"], "samples": [], "losses": []})
            known["samples"] += entry["samples"]
            known["losses"].append(entry["loss"])
    return steps


@pytest.mark.slow
def test_a_killed_run_sees_every_sample_once(tmp_path: Path, shards: Callable[..., str]):
    """Also in the middle of a length group; two processes, below, go without."""
    folder = shards(SAMPLES, 7, words=lambda index: 1 + index * 5 % 11)
    common = ["--length-group", "16"]
    run(folder, tmp_path / "whole", "--num-workers", "1", *common)
    whole = diary(tmp_path / "whole")
    assert len(whole) == 18
    run(folder, tmp_path / "cut", "--num-workers", "2", "--kill-at", "8", *common, ends=-signal.SIGKILL)
    assert max(diary(tmp_path / "cut")) == 8  # two steps after the last checkpoint, which was at 6
    run(folder, tmp_path / "cut", "--resume", "--num-workers", "0", *common)
    cut = diary(tmp_path / "cut")
    assert cut == whole  # samples and losses, bit for bit
    assert Counter(s for step in range(1, 13) for s in cut[step]["samples"]) == Counter(range(SAMPLES))


@pytest.mark.slow
def test_two_killed_processes_see_every_sample_once(tmp_path: Path, shards: Callable[..., str]):
    folder = shards(SAMPLES, 7, words=lambda index: 1 + index * 5 % 11)
    run(folder, tmp_path / "alone")
    alone = diary(tmp_path / "alone")
    run(folder, tmp_path / "cut", "--num-workers", "1", "--kill-at", "8", processes=2, ends=-signal.SIGKILL)
    run(folder, tmp_path / "cut", "--resume", "--num-workers", "2", processes=2)
    cut = diary(tmp_path / "cut", processes=2)
    assert {step: entry["samples"] for step, entry in cut.items()} == {s: e["samples"] for s, e in alone.items()}
    assert Counter(s for step in range(1, 13) for s in cut[step]["samples"]) == Counter(range(SAMPLES))
    whole = tmp_path / "whole"
    run(folder, whole, processes=2)
    assert cut == diary(whole, processes=2)
