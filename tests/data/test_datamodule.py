"""ShardDataModule under a real Trainer, and what it says when something is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import ProcessorMixin

from avar_lightning.data import ShardDataModule
from tests.data.conftest import make_sample, sample_files, write_tar


class Listener(L.LightningModule):
    """Learns nothing; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.heard: dict[str, list[list[int]]] = {"train": [], "val": [], "predict": []}

    def hear(self, stage: str, batch: dict[str, Any]) -> torch.Tensor:
        self.heard[stage].append([columns["index"] for columns in batch["columns"]])
        return self.weight * batch["input_ids"].float().mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.hear("train", batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.hear("val", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.hear("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, data: ShardDataModule, checkpoint: Path | None = None, **options: Any
) -> tuple[Listener, L.Trainer]:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing="callbacks" in options,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    module = Listener()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fit_reshuffles_each_epoch_and_validates_in_order(
    tmp_path: Path, shards: Callable[..., str], processor: ProcessorMixin, num_workers: int
):
    folder = shards(8, 3)
    data = ShardDataModule(
        train=folder, val=folder, processor=processor, batch_size=4, val_batch_size=8, num_workers=num_workers
    )
    module, trainer = fit(tmp_path, data, max_epochs=2, num_sanity_val_steps=0)
    assert trainer.num_training_batches == 2
    first, second = module.heard["train"][:2], module.heard["train"][2:]
    assert sorted(first[0] + first[1]) == sorted(second[0] + second[1]) == list(range(8))
    assert first != second
    assert module.heard["val"] == [list(range(8))] * 2
    assert data.counts == {
        "train": {"seen": 16, "bad": 0, "too_long": 0},
        "val": {"seen": 16, "bad": 0, "too_long": 0},
    }


@pytest.mark.parametrize("steps", [6, 8])  # at the end and in the middle of an epoch
def test_a_run_resumes_with_the_next_batch(
    tmp_path: Path, shards: Callable[..., str], processor: ProcessorMixin, steps: int
):
    folder = shards(12, 5)

    def data() -> ShardDataModule:
        return ShardDataModule(train=folder, processor=processor, batch_size=2, num_workers=1)

    whole, _ = fit(tmp_path, data(), max_steps=12)
    half, trainer = fit(tmp_path, data(), max_steps=steps)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(tmp_path, data(), tmp_path / "half.ckpt", max_steps=12)
    assert half.heard["train"] + rest.heard["train"] == whole.heard["train"]


@pytest.mark.parametrize(("steps", "num_workers"), [(2, 0), (4, 2), (6, 0), (8, 2)])
def test_shards_of_unknown_size_resume_too(
    tmp_path: Path, shards: Callable[..., str], processor: ProcessorMixin, steps: int, num_workers: int
):
    """Lightning then asks for a batch more than it trains on, before it tells the epoch; at its end it skips one."""
    folder = shards(12, 5)
    pipes = [f"pipe:cat {folder}/shard-{number:06d}.tar" for number in range(3)]

    def data() -> ShardDataModule:
        cache = str(tmp_path / "cache")
        return ShardDataModule(
            train=pipes, processor=processor, batch_size=2, num_workers=num_workers, cache_folder=cache
        )

    whole, _ = fit(tmp_path, data(), max_steps=14)
    half, trainer = fit(tmp_path, data(), max_steps=steps)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(tmp_path, data(), tmp_path / "half.ckpt", max_steps=14)
    if steps == 6:  # the order of epoch 2 takes the place of that of epoch 1
        assert rest.heard["train"][:2] == whole.heard["train"][12:]
        assert sorted(index for batch in rest.heard["train"][:6] for index in batch) == list(range(12))
    else:
        assert half.heard["train"] + rest.heard["train"] == whole.heard["train"]


def test_a_step_that_was_broken_off_is_made_again(
    tmp_path: Path, shards: Callable[..., str], processor: ProcessorMixin
):
    folder = shards(12, 5)

    def data() -> ShardDataModule:
        return ShardDataModule(train=folder, processor=processor, batch_size=2, num_workers=0)

    class Breaks(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("broke")

    whole, _ = fit(tmp_path, data(), max_steps=8)
    saving = ModelCheckpoint(tmp_path, filename="saved", save_on_exception=True)
    with pytest.raises(RuntimeError, match="broke"):
        fit(tmp_path, data(), max_steps=8, callbacks=[Breaks(), saving])
    (saved,) = tmp_path.glob("*.ckpt")
    rest, _ = fit(tmp_path, data(), saved, max_steps=8)
    assert rest.heard["train"] == whole.heard["train"][3:]


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_short_epochs_resume(tmp_path: Path, shards: Callable[..., str], processor: ProcessorMixin, step: int):
    """Under `limit_train_batches` an epoch ends before its data does; also when it is saved right there."""
    folder = shards(12, 5)

    def data() -> ShardDataModule:
        return ShardDataModule(train=folder, processor=processor, batch_size=2, num_workers=0)

    options = {"max_epochs": 3, "limit_train_batches": 4}
    whole, _ = fit(tmp_path, data(), **options)
    assert len(whole.heard["train"]) == 12
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    fit(tmp_path, data(), callbacks=[saving], **options)
    rest, trainer = fit(tmp_path, data(), tmp_path / f"step={step}.ckpt", **options)
    assert rest.heard["train"] == whole.heard["train"][step:]
    assert trainer.global_step == 12


def test_what_was_left_out_is_said_at_the_end(tmp_path: Path, processor: ProcessorMixin):
    files = {f"g{i}": sample_files(make_sample(i, words=40 if i == 1 else 3)) for i in range(8)}
    files["g2"]["0.png"] = b"not a picture"
    path = str(write_tar(tmp_path / "x.tar", files))
    data = ShardDataModule(
        train=path, processor=processor, batch_size=8, num_workers=0, max_length=60, max_bad_fraction=0.5
    )
    with pytest.warns(
        UserWarning, match=r"train data: of 8 samples .* 1 were bad and skipped, 1 longer than max_length=60"
    ):
        fit(tmp_path, data, max_epochs=1)
    assert data.counts["train"] == {"seen": 8, "bad": 1, "too_long": 1}


def test_predict_reads_in_order(tmp_path: Path, shards: Callable[..., str], processor: ProcessorMixin):
    data = ShardDataModule(predict=shards(5, 2), processor=processor, batch_size=2, keep_images=True)
    module = Listener()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    assert module.heard["predict"] == [[0, 1], [2, 3], [4]]
    assert len(next(iter(data.predict_dataloader()))["images"]) == 2


@pytest.mark.parametrize("stage", ["train", "test", "predict"])
def test_missing_shards_name_the_setting(processor: ProcessorMixin, stage: str):
    data = ShardDataModule(processor=processor)
    with pytest.raises(ValueError, match=f"no {stage} shards: .*set --data.init_args.{stage}"):
        getattr(data, f"{stage}_dataloader")()
    assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"val_batch_size": 0}, "val_batch_size is 0; expected at least 1"),
        ({"shuffle_window": -1}, "shuffle_window is -1; expected at least 0"),
        ({"num_workers": -1}, "num_workers is -1; expected at least 0"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction is 2.0; expected a share in \[0, 1\]"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        ShardDataModule(**options)


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ShardDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "Shards to train on",
        "Most tokens of a sample",
        "Share of corrupt samples",
        "Neighbouring training samples",
    ):
        assert phrase in text
