"""When one process ends, the others do not wait for it for ever."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.sharding import dying, training

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CASES = [
    (TORCHRUN, "fsdp2", 1, "killed"),
    (TORCHRUN, "ddp", 0, "raises"),
    ([], "fsdp2", 1, "killed"),
    ([], "fsdp2", 1, "raises"),
    ([], "ddp", 0, "raises"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "strategy", "rank", "how"), CASES, ids=lambda value: "torchrun" if value == TORCHRUN else None
)
def test_the_others_end_with_an_error(tmp_path, launcher, strategy, rank, how):
    training.prepare(tmp_path, {"one": training.Case()})
    command = [sys.executable, *launcher, "-m", dying.__name__, str(tmp_path), strategy, str(rank), how]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=150)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode not in (0, None), said[-2000:]
        assert "rank" in said.lower() or "fallen off" in said, said[-2000:]
        assert not _alive(process.pid), "processes are left behind"


def _alive(session):
    """Processes of a session, some seconds after its first one ended."""
    for _ in range(50):
        found = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True)
        alive = [line for line in found.stdout.splitlines() if line.strip() and "Z" not in line]
        if not alive:
            return []
        time.sleep(0.2)
    return alive
