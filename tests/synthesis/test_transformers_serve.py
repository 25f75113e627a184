"""All three stages on `transformers serve`, which is real software with a real (small) vision-language model."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from avar_lightning.synthesis import synthesize
from tests.synthesis.conftest import make_config, rejected, written
from tests.synthesis.server import write_questions
from tests.synthesis.small_vlm import save_small_vlm

SAYS = ["<think>I look at the square. ", "It is dark red and has no dots on it at all, on no side and in no corner. "]
SAYS += ["Let me look back at its middle: ", "nothing there. ", "In the image I see 0 dots.", "</think>", "<answer>0"]
SAYS += ["</answer>"]


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """`transformers serve FOLDER`; its URL and the model's name."""
    folder = tmp_path_factory.mktemp("small_vlm")
    save_small_vlm(folder, SAYS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 180
        while not _healthy(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _healthy(port):
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.slow
def test_the_three_stages_run_on_it(serving, tmp_path):
    url, model = serving
    path = write_questions(tmp_path / "in", 3)
    filters = {"min_words": 5, "duplicate_responses": False, "max_repetition": 1.0}
    stage = {"model": model, "max_tokens": 40, "temperature": 0.5, "timeout": 60.0}
    config = make_config(url, path, tmp_path / "out", stage=stage, filters=filters, concurrency=2)
    report = synthesize(config)
    assert (report.read, report.kept, report.left) == (3, 1, 0)
    assert {row["reason"] for row in rejected(config).values()} == {
        f"agreement: reason: answers '0', the gold answer is {answer}" for answer in (1, 2)
    }
    sample = written(config)["q0"]
    assert sample.messages[-1]["content"] == "".join(SAYS)
    assert sample.columns["synthesis"]["scores"]["anchors"] == 3
    # It counts tokens itself, and the image's four among them.
    assert report.spent["describe"]["estimated"] == 0
    assert report.spent["anchor"]["completion_tokens"] == len(SAYS) + 1
    assert report.spent["describe"]["prompt_tokens"] > report.spent["describe"]["answers"] * 500

    cut = make_config(url, path, tmp_path / "cut", stage=stage | {"max_tokens": 3}, filters=filters)
    assert synthesize(cut).rejected["cut"] == 3

    wrong = make_config(url, path, tmp_path / "wrong", stage=stage | {"extra": {"no_such_field": 1}})
    with pytest.raises(RuntimeError, match=r"answered 422 .*no_such_field"):
        synthesize(wrong)
