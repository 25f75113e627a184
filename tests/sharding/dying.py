"""A training on two processes of which one ends in the middle: killed, or by an error."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch

from avar_lightning.data import DemoDataModule
from tests.sharding.training import STRATEGIES, Case, make_module


class End(L.Callback):
    def __init__(self, rank, how):
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the disk has fallen off")


def main(folder, strategy, rank, how):
    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](),
        max_steps=50,
        limit_val_batches=0,
        callbacks=[End(rank, how)],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DemoDataModule(str(folder / "data"), num_train=64, num_val=10, batch_size=2, num_workers=0)
    trainer.fit(make_module(Case(), folder), data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
