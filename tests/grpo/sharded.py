"""Run by torchrun: GRPO on two processes that share the weights (FSDP2, gloo); writes what it came to."""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from avar_lightning import GRPOModule
from avar_lightning.callbacks import CompletionsCallback
from avar_lightning.data import DemoDataModule
from avar_lightning.grpo import GRPOConfig
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.rewards import RewardConfig, VisualAttentionReward
from avar_lightning.rollout import SamplingConfig


def length_is_even(completions, completion_ids, **_):
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def module(lr=1e-3):
    torch.manual_seed(7)
    return GRPOModule(
        VLMConfig("demo", from_scratch=True),
        GRPOConfig(num_generations=4, micro_batch_size=3, max_grad_norm=0.0, num_epochs=2),
        SamplingConfig(max_new_tokens=12, temperature=2.0),
        [RewardConfig(length_is_even, name="accuracy")],
        VisualAttentionReward("share"),
        None,
        OptimizerConfig(lr=lr, warmup_fraction=0.0),
    )


class Save(L.Callback):
    def __init__(self, folder):
        self.folder, self.gradients = folder, None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            named = pl_module.named_parameters()
            self.gradients = {n: p.grad.full_tensor().clone() for n, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = {n: p.detach().full_tensor() for n, p in pl_module.named_parameters()}
        state = {"weights": weights, "gradients": self.gradients, "rollouts": pl_module.rollouts}
        if trainer.global_step == 2:
            torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def main(folder, precision):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        precision=precision,
        max_steps=2,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[Save(folder), CompletionsCallback(every_n_batches=1)],
        **quiet,
    )
    options = {"num_train": 64, "num_val": 10, "num_workers": 0, "shuffle_window": 16}
    trainer.fit(module(), DemoDataModule(str(folder / "data"), train_prompts=True, batch_size=2, **options))
    trainer.save_checkpoint(folder / "saved.ckpt")
    trainer.lightning_module.save_pretrained(folder / "hf")
    trainer.fit_loop.epoch_loop.max_steps = 4
    data = DemoDataModule(str(folder / "data"), train_prompts=True, batch_size=2, **options)
    trainer.fit(module(), data, ckpt_path=folder / "saved.ckpt")
    if trainer.is_global_zero:
        (folder / "resumed.txt").write_text(str(trainer.global_step))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
