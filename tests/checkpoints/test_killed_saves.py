"""Runs that are killed at random moments, most of them while they save."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avar_lightning.checkpoints import load_weights, look_into
from tests.checkpoints import training

KILLS = 8


def start(shards, folder, *options, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    module = ["-m", training.__name__]
    return subprocess.Popen(
        [*map(str, [*command, *module, shards, folder, "--max-steps", 400, "--every", 1, "--top", 2, *options])],
        stderr=(folder.parent / "log").open("a"),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("options", "processes"), [([], 1), (["--sharded", "--batch-size", 2], 2)])
def test_something_whole_is_there_after_every_kill(write, tmp_path, options, processes):
    """Every checkpoint in the folder opens, `last` is among them, and the next run goes on from it."""
    import os

    shards, folder, rng = write(48), tmp_path / "run", random.Random(0)
    folder.mkdir()
    reached, unfinished = 0, 0
    for _ in range(KILLS):
        last = folder / "last.ckpt"
        before = look_into(last).extra["global_step"] if last.exists() else 0
        process = start(shards, folder, *options, *(["--resume", last] if last.exists() else []), processes=processes)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if (folder / "0.jsonl").exists() and (folder / "0.jsonl").stat().st_mtime > time.time() - 0.5:
                break
        time.sleep(rng.uniform(0.3, 2.0))
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        unfinished += any(folder.glob("*.ckpt.tmp*")) or any(folder.glob("*.ckpt.old"))
        reached = look_into(last).extra["global_step"]
        assert reached > before
        for path in folder.glob("*.ckpt"):
            contents = look_into(path)
            assert load_weights(contents).keys() == contents.shapes.keys()
            assert sum(tensor.sum() for tensor in load_weights(contents).values()).isfinite()
    assert unfinished  # or no kill came while something was being saved
