"""Runs that are killed at random moments, most of them while they save."""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avar_lightning.checkpoints import load_weights, look_into
from tests.checkpoints import training

KILLS = 8


def start(shards, folder, *options, processes):
    """Processes that are told what torchrun tells; it would put them beyond the reach of a kill."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test"}
    told |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    module = [sys.executable, "-m", training.__name__, shards, folder, "--max-steps", 400, "--every", 1, "--top", 2]
    return [
        subprocess.Popen(
            list(map(str, [*module, *options])),
            stderr=(folder.parent / "log").open("a"),
            stdout=subprocess.DEVNULL,
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(processes)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("options", "processes"), [([], 1), (["--sharded", "--batch-size", 2], 2)])
def test_something_whole_is_there_after_every_kill(write, tmp_path, options, processes):
    """Every checkpoint in the folder opens, `last` is among them, and the next run goes on from it."""
    shards, folder, rng = write(48), tmp_path / "run", random.Random(0)
    folder.mkdir()
    reached, unfinished = 0, 0
    for _ in range(KILLS):
        last = folder / "last.ckpt"
        before = look_into(last).extra["global_step"] if last.exists() else 0
        began = time.time()
        started = start(shards, folder, *options, *(["--resume", last] if last.exists() else []), processes=processes)
        deadline = time.monotonic() + 300
        while not (last.exists() and last.stat().st_mtime > began) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 2.0))
        assert all(process.poll() is None for process in started), (tmp_path / "log").read_text()[-3000:]
        for process in started:
            process.kill()
        for process in started:
            process.wait()
        unfinished += any(folder.glob("*.ckpt.tmp*")) or any(folder.glob("*.ckpt.old"))
        reached = look_into(last).extra["global_step"]
        assert reached > before
        for path in folder.glob("*.ckpt"):
            contents = look_into(path)
            assert load_weights(contents).keys() == contents.shapes.keys()
            assert sum(tensor.sum() for tensor in load_weights(contents).values()).isfinite()
    assert unfinished  # or no kill came while something was being saved
