"""`save_last: link`: at any moment `last.ckpt` is whole and the newest, with and without a monitor, file or folder."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import TorchCheckpointIO

from avar_lightning.callbacks import Checkpoint
from avar_lightning.checkpoints import recover
from tests.breaking import killed

SCORES = (3.0, 1.0, 2.0, 4.0, 0.5, 0.7)  # the best are those of updates 2 and 5


class Scored(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("score", SCORES[batch_idx])
        return super().training_step(batch, batch_idx)


class Folders(TorchCheckpointIO):
    """As sharding strategies write: a folder."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).mkdir(parents=True)
        super().save_checkpoint(checkpoint, Path(path) / "meta.pt")


def step_of(path):
    return torch.load(path / "meta.pt" if path.is_dir() else path)["global_step"]


class Watch(L.Callback):
    """Sees `last` after every update."""

    def __init__(self, folder):
        self.last, self.seen = folder / "last.ckpt", []

    def on_train_batch_start(self, *_):
        if self.last.exists():
            self.seen.append(step_of(self.last))


def train(folder, kind, *, steps=6, every=1, resume=None, fast_dev_run=False, **options):
    saving = Checkpoint(folder, "{step}", every_n_train_steps=every, save_last="link", **options)
    watch = Watch(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        fast_dev_run=fast_dev_run,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[Folders()] if kind == "folder" else [],
        callbacks=[watch, saving],
    )
    trainer.fit(Scored(), ckpt_path=resume)
    return watch.seen


OPTIONS = {
    "newest": {"save_top_k": 1},
    "best": {"save_top_k": 1, "monitor": "score"},
    "two best": {"save_top_k": 2, "monitor": "score"},
}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(("which", "kept"), [("newest", {6}), ("best", {5}), ("two best", {5, 6})])
def test_last_is_the_newest(tmp_path, kind, which, kept):
    assert train(tmp_path, kind, **OPTIONS[which]) == [1, 2, 3, 4, 5]
    assert step_of(tmp_path / "last.ckpt") == 6
    assert {step_of(path) for path in tmp_path.glob("step=*.ckpt")} == kept
    assert (tmp_path / "last.ckpt").is_symlink() == (6 in kept)
    assert len(list(tmp_path.iterdir())) == len(kept) + 1


def test_a_run_that_goes_on_from_its_first_checkpoint_keeps_the_name(tmp_path):
    """Or else whoever is started again and again with `last.ckpt` would begin there every time."""
    train(tmp_path, "file", steps=1, **OPTIONS["newest"])
    assert train(tmp_path, "file", resume=tmp_path / "last.ckpt", **OPTIONS["newest"]) == [1, 2, 3, 4, 5]
    assert step_of(tmp_path / "last.ckpt") == 6
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "step=6.ckpt"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_training_ended_with_is_kept_where_nothing_was_due(tmp_path, kind):
    train(tmp_path, kind, every=9, **OPTIONS["newest"])
    assert step_of(tmp_path / "last.ckpt") == 6
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_trying_leaves_nothing(tmp_path):
    train(tmp_path, "file", fast_dev_run=True, **OPTIONS["newest"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_last_is_whole_after_a_kill_at_any_step(tmp_path, monkeypatch, kind, options):
    """And not older than what was saved before the one that was being saved."""
    stop = 0
    while True:
        folder = tmp_path / str(stop)
        with killed(monkeypatch, stop, ("rename", "replace", "unlink", "rmdir")) as broken:
            train(folder, kind, **options)
        if not broken:
            break
        recover(folder / "last.ckpt")
        found = {step_of(path) for path in folder.glob("step=*.ckpt")}
        if (folder / "last.ckpt").exists():
            assert step_of(folder / "last.ckpt") >= max(found, default=0) - 1
        else:
            assert max(found, default=0) <= 1
            assert not (folder / "last.ckpt").is_symlink()
        stop += 1
    assert stop > 20
