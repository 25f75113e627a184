"""A training on shards that writes down every step, and is killed when told to."""

import argparse
import json
import os
import signal
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from avar_lightning import SFTModule
from avar_lightning.data import ShardDataModule
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig


class Diary(L.Callback):
    """Appends each step's samples and loss to a file that a kill cannot take back."""

    def __init__(self, path, kill_at):
        self.path, self.kill_at = path, kill_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach()
        samples = [columns["index"] for columns in batch["columns"]]
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, "samples": samples, "loss": float(loss)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--length-group", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    L.seed_everything(1)
    module = SFTModule(
        VLMConfig("demo", from_scratch=True),
        GuidanceConfig(form="hinge"),
        OptimizerConfig(lr=1e-3, warmup_fraction=0.2),
    )
    data = ShardDataModule(
        train=options.shards,
        batch_size=4 // world_size,
        num_workers=options.num_workers,
        length_group=options.length_group,
        shuffle_window=20,
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = options.folder / "last.ckpt"
    saving = ModelCheckpoint(
        options.folder, filename="last", every_n_train_steps=3, save_top_k=1, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_steps=18,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=options.folder,
        callbacks=[Diary(options.folder / f"{rank}.jsonl", options.kill_at), saving],
    )
    trainer.fit(module, data, ckpt_path=checkpoint if options.resume else None)
