"""Killed at any moment and started again: nothing that was answered is paid again, and the output is the same."""

import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from avar_lightning import background
from avar_lightning.synthesis import synthesize
from avar_lightning.synthesis.journal import Journal
from avar_lightning.synthesis.stages import Answer
from tests.synthesis.conftest import make_config, output_bytes
from tests.synthesis.server import write_questions

COUNT, CONCURRENCY = 12, 3


def start(options):
    """A process that begins with everything imported, as a fork: a fresh one takes many seconds."""
    process = multiprocessing.get_context("fork").Process(target=in_fork, args=(options,))
    process.start()
    return process


def in_fork(options):
    background._loop.cache_clear()  # its thread did not come along
    run(options)


def run(options):
    synthesize(make_config(**options))


def imperfect(server):
    server.texts["reason", 2] = "Many. <answer>99</answer>"
    server.texts["anchor", 5] = "No chain."
    server.texts["reason", 7] = ""
    server.refusals["anchor", 8] = 400, "the maximum context length is 7"
    server.refusals["describe", 9] = 400, "maximum context length"
    server.delay = 0.02


def journaled(folder):
    """Seeds, which tell calls apart, of those whose answer is in the journal."""
    path = Path(folder) / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [int(row["key"][:8], 16) % 2**31 for row in rows if "answer" in row]


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_change_nothing(server, tmp_path, seed):
    imperfect(server)
    path = write_questions(tmp_path / "in", COUNT)
    options = {"url": server.url, "input": path, "concurrency": CONCURRENCY, "samples_per_shard": 5}
    run(options | {"output": tmp_path / "whole"})
    expected = output_bytes(tmp_path / "whole")
    assert len(expected) == 4
    out, rng, kills = tmp_path / "killed", random.Random(seed), 0
    total, answers = len(server.requests), len(journaled(tmp_path / "whole"))
    assert total == answers + 6 + 2  # with empty answers and refusals
    server.requests.clear()
    server.answered.clear()
    for moment in sorted(rng.sample(range(total), 3)):
        paid = set(journaled(out))
        before = len(server.requests)
        process = start(options | {"output": out})
        deadline = time.monotonic() + 60
        while len(server.answered) < moment and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert not paid & {body["seed"] for body in server.requests[before:]}
    paid, before = set(journaled(out)), len(server.requests)
    run(options | {"output": out})
    assert kills >= 2
    assert not paid & {body["seed"] for body in server.requests[before:]}
    assert output_bytes(out) == expected
    seeds = journaled(out)
    assert len(seeds) == len(set(seeds)) == answers
    assert len(server.requests) <= total + kills * CONCURRENCY  # only those that were on their way
    assert not list(out.glob("*.tmp"))


def test_a_kill_while_shards_are_written_changes_nothing(server, tmp_path):
    imperfect(server)
    path = write_questions(tmp_path / "in", COUNT)
    options = {"url": server.url, "input": path, "concurrency": CONCURRENCY, "samples_per_shard": 1}
    run(options | {"output": tmp_path / "whole"})
    out = tmp_path / "killed"
    process = start(options | {"output": out})
    deadline = time.monotonic() + 60
    while not list(out.glob("shard-*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    asked = len(server.requests)
    run(options | {"output": out})
    assert len(server.requests) == asked
    assert output_bytes(out) == output_bytes(tmp_path / "whole")
    assert not list(out.glob("*.tmp"))


@pytest.fixture
def _ctrl_c():
    """Python's own handler, though a shell that started the tests in the background had them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_an_interrupted_run_goes_on(server, prepare, tmp_path):
    """Ctrl-C: what is on its way is dropped, and the journal can be opened again at once."""
    server.delay = 1.0
    ended = threading.Event()

    def interrupt():
        while len(server.answered) < 2:
            time.sleep(0.01)
        while not ended.is_set():  # Python drops an interrupt that comes while it collects garbage
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(2)

    threading.Thread(target=interrupt, daemon=True).start()

    def run():
        try:
            synthesize(prepare(30))
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        run()
    server.delay = 0.0
    time.sleep(1.2)  # what had left has arrived
    asked = len(server.requests)
    lines = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    sent, settled = (sum(name in json.loads(line) for line in lines) for name in ("sent", "stage"))
    assert asked <= sent < 30
    assert settled == 2 * sent  # every request was answered, or is noted as lost
    time.sleep(0.3)
    assert len(server.requests) == asked
    assert synthesize(prepare(30)).kept == 30
    assert len(server.requests) <= 90 + 4


def test_a_finished_run_asks_nothing(server, prepare):
    config = prepare(3)
    synthesize(config)
    before, asked = output_bytes(config.output), len(server.requests)
    assert synthesize(config).kept == 3
    assert (output_bytes(config.output), len(server.requests)) == (before, asked)


def test_a_server_that_moved_is_the_same_model(server, prepare):
    synthesize(prepare(2))
    asked = len(server.requests)
    moved = prepare(2, stage={"base_url": server.url.replace("127.0.0.1", "localhost")})
    assert synthesize(moved).kept == 2
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.2}, {"model": "reason"}, {"max_tokens": 201}, {"top_p": 0.5}, {"extra": {"a": 1}}],
    ids=str,
)
def test_another_question_is_another_call(server, prepare, change):
    synthesize(prepare(1))
    server.texts["reason", 0] = "Other. <answer>0</answer>"
    synthesize(prepare(1, describe=change))
    assert len(server.requests) in (4, 6)  # its own, and those that follow where its answer changed
    assert len(server.asked("describe")) + len(server.asked("reason")) > 2


def test_other_prompts_ask_again_from_there(server, prepare, tmp_path):
    synthesize(prepare(2))
    prompt = tmp_path / "anchor.md"
    prompt.write_text("$question $chain Weave.")
    report = synthesize(prepare(2, anchor={"prompt": str(prompt)}))
    assert [len(server.asked(name)) for name in ("describe", "reason", "anchor")] == [2, 2, 4]
    assert (report.kept, report.requests) == (2, 8)


def test_a_torn_line_is_dropped_and_asked_again(server, prepare):
    config = prepare(3)
    synthesize(config)
    expected = output_bytes(config.output)
    path = Path(config.output) / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    asked = len(server.requests)
    synthesize(config)
    assert len(server.requests) == asked + 1
    assert output_bytes(config.output) == expected
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_that_makes_no_sense_is_named(prepare):
    config = prepare(1)
    synthesize(config)
    path = Path(config.output) / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{nonsense\n" + "".join(lines[1:]))
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2, is none of a journal .* delete that line"):
        synthesize(config)


def test_two_processes_do_not_share_a_journal(prepare):
    config = prepare(1)
    journal = Journal(Path(config.output) / "journal.jsonl", config.input)
    try:
        with pytest.raises(RuntimeError, match="is being written by another process"):
            synthesize(config)
    finally:
        journal.close()
    assert synthesize(config).kept == 1


def test_another_input_is_refused(prepare, tmp_path):
    config = prepare(1)
    synthesize(config)
    other = write_questions(tmp_path / "other", 2)
    config.input = str(other)
    with pytest.raises(ValueError, match=r"is of the input .*give another output"):
        synthesize(config)
    config.overwrite = True
    assert synthesize(config).kept == 2


def test_an_answer_is_read_back_as_it_was(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", "x")
    answer = Answer('Zeilen\nund "Zeichen" – \u2028 😀', "gedacht", "stop", 7, 9, estimated=True)
    journal.answered(journal.sent("reason", 10), "k", answer)
    assert journal.find("k") == answer
    journal.close()
    again = Journal(tmp_path / "journal.jsonl", "x")
    assert again.find("k") == answer
    assert again.find("other") is None
    assert again.total.tokens == 16
    again.close()


@contextmanager
def room_for(size):
    """Files end at `size` bytes: the last write that fits takes a part, the next fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "x")
    journal.answered(journal.sent("reason", 10), "k", Answer("whole"))
    whole, number = path.read_bytes(), journal.sent("reason", 10)
    with (
        room_for(path.stat().st_size + 50),
        pytest.raises(RuntimeError, match=r"journal\.jsonl cannot be written \(File too large\); make room, .*same"),
    ):
        journal.answered(number, "l", Answer("torn" * 50))
    with pytest.raises(RuntimeError, match="cannot be written"):  # also when there is room again
        journal.sent("reason", 10)
    assert journal.find("l") is None
    journal.close()
    lines = path.read_bytes().removeprefix(whole).splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"sent", "stage", "tokens"}]
    again = Journal(path, "x")
    assert again.find("k") == Answer("whole")
    again.close()


def test_a_full_disk_ends_the_run_and_a_later_one_goes_on(server, prepare):
    config = prepare(6)
    with room_for(3000), pytest.raises(RuntimeError, match=r"journal\.jsonl cannot be written .*same command again"):
        synthesize(config)
    paid = set(journaled(config.output))
    assert paid
    before = len(server.requests)
    assert synthesize(config).kept == 6
    assert not paid & {body["seed"] for body in server.requests[before:]}
    clean = prepare(6, output="clean")
    synthesize(clean)
    assert output_bytes(config.output) == output_bytes(clean.output)
