"""A name stands for something whole, whatever happens while it is given or taken."""

import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from avar_lightning.checkpoints import beside, put, recover, remove, sweep
from avar_lightning.checkpoints.opening import WholeCheckpointIO
from tests.breaking import killed

STEPS = ("rename", "replace", "unlink", "rmdir", "fsync")


def make(path: Path, kind: str, text: str) -> None:
    if kind == "file":
        path.write_text(text)
        return
    path.mkdir()
    for name in "ab":
        (path / name).write_text(text)


def whole(path: Path) -> str:
    """What is there, which must be of one piece."""
    texts = {path.read_text()} if path.is_file() else {(path / name).read_text() for name in "ab"}
    (text,) = texts
    return text


@pytest.mark.parametrize("before", ["file", "folder", "nothing"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_something_whole_has_the_name_after_a_kill_at_any_step(tmp_path, monkeypatch, before, after):
    stop, ends = 0, set()
    while True:
        folder = tmp_path / str(stop)
        folder.mkdir()
        path = folder / "last.ckpt"
        if before != "nothing":
            make(path, before, "old")
        make(beside(path), after, "new")
        with killed(monkeypatch, stop, STEPS) as broken:
            put(beside(path), path)
        recover(path)
        ends.add(whole(path) if path.exists() else "nothing")
        sweep(folder, ".ckpt")
        assert {each.name for each in folder.iterdir()} <= {"last.ckpt"}
        if not broken:
            break
        stop += 1
    assert stop > 2
    assert whole(path) == "new"
    assert ends <= {"nothing" if before == "nothing" else "old", "new"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_removed_is_whole_or_gone(tmp_path, monkeypatch, kind):
    stop, broken = 0, ["first"]
    while broken:
        path = tmp_path / f"{stop}.ckpt"
        make(path, kind, "old")
        with killed(monkeypatch, stop, STEPS) as broken:
            remove(path)
        assert not path.exists() or whole(path) == "old"
        stop += 1
    sweep(tmp_path, ".ckpt")
    assert stop > 2
    assert not path.exists()
    assert all(each.suffix == ".ckpt" and whole(each) == "old" for each in tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "last.ckpt"
    saving = WholeCheckpointIO()
    saving.save_checkpoint({"number": 1}, path)

    def work(says):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            saving.save_checkpoint({"tensor": torch.zeros(1_000_000)}, path)
        except OSError as error:
            says.send(str(error))

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,))
    process.start()
    assert ours.poll(60)
    assert "last.ckpt cannot be written (File too large): free space" in ours.recv()
    process.join()
    assert torch.load(path) == {"number": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
