"""Start the training of `training.py` in processes of their own, and read what it wrote down."""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

from tests.checkpoints import training


def run(shards: str, folder: Path, *options: Any, processes: int = 1, ends: int = 0) -> None:
    """Train in processes of their own; forked, as starting Python anew would take most of the time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def work(rank: int) -> None:
        # What torchrun tells.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        training.train(training.parser().parse_args([shards, str(folder), *map(str, options)]))

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=work, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(180)
        process.kill()
    assert [process.exitcode for process in started] == [ends] * processes


def book(folder: Path, processes: int = 1) -> list[dict[str, Any]]:
    """Each batch as it was written down; of several processes samples together and losses averaged."""
    lines = [[json.loads(line) for line in (folder / f"{r}.jsonl").read_text().splitlines()] for r in range(processes)]
    return [
        {
            "step": group[0]["step"],
            "lr": group[0]["lr"],
            "samples": [sample for entry in group for sample in entry["samples"]],
            "loss": sum(entry["loss"] for entry in group) / processes,
        }
        for group in zip(*lines, strict=True)
    ]
