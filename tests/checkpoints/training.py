"""A training that writes down every step, saves often, and is started in one or two processes under any strategy."""

import argparse
import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from avar_lightning import GRPOModule, SFTModule
from avar_lightning.callbacks import Checkpoint
from avar_lightning.data import ShardDataModule
from avar_lightning.grpo import GRPOConfig
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.model import LoRAConfig, VLMConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.rewards import RewardConfig
from avar_lightning.rollout import SamplingConfig
from tests.data.killed import Diary
from tests.sharding.training import FSDP1Strategy


def sum_is_even(completions, completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def checksum(module):
    """Of everything that trains, which is what GRPO's steps come to."""
    trained = [p.detach() for p in module.parameters() if p.requires_grad]
    return sum((p.full_tensor() if isinstance(p, DTensor) else p).double().abs().sum() for p in trained)


class Book(Diary):
    """As it is, for modules that optimise by hand too, with the learning rate of each step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach() if outputs else checksum(pl_module)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        samples = [columns["index"] for columns in batch["columns"]]
        line = {"step": trainer.global_step, "samples": samples, "loss": float(loss), "lr": rate}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="sft")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--one-file", action="store_true")
    parser.add_argument("--fsdp1", action="store_true")
    parser.add_argument("--hf", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--max-epochs", type=int, default=-1)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--val-every", type=int, default=0)
    parser.add_argument("--resume")
    parser.add_argument("--top", type=int, default=-1)
    parser.add_argument("--says", type=Path)
    return parser


def module(options):
    vlm = VLMConfig("demo", from_scratch=True, lora=LoRAConfig(r=4, dropout=options.dropout) if options.lora else None)
    rate = OptimizerConfig(lr=1e-3, warmup_fraction=0.2)
    if options.kind == "sft":
        return SFTModule(vlm, GuidanceConfig(form="hinge"), rate)
    grpo = GRPOConfig(num_generations=4, micro_batch_size=4, num_epochs=2)
    rewards = [RewardConfig(sum_is_even, name="accuracy")]
    return GRPOModule(vlm, grpo, SamplingConfig(max_new_tokens=6, temperature=2.0), rewards, None, None, rate)


def train(options):
    torch.set_num_threads(1)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    L.seed_everything(1)
    made = module(options)
    data = ShardDataModule(
        train=options.shards,
        val=options.shards if options.val_every else None,
        batch_size=options.batch_size,
        num_workers=0,
        shuffle_window=20,
        train_prompts=options.kind == "grpo",
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    strategy = "ddp" if world_size > 1 else "auto"
    if options.sharded:
        strategy = ModelParallelStrategy(world_size, 1, save_distributed_checkpoint=not options.one_file)
    if options.fsdp1:
        strategy = FSDP1Strategy()
    often = {} if options.val_every else {"every_n_train_steps": options.every}
    kept = {"save_top_k": options.top, "save_last": True, "monitor": "step", "mode": "max"}
    saving = Checkpoint(options.folder, filename="{step}", **kept, **often)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=options.max_steps,
        max_epochs=options.max_epochs,
        accumulate_grad_batches=options.accumulate,
        val_check_interval=options.val_every or None,
        check_val_every_n_epoch=None if options.val_every else 1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1 if options.val_every else 0,
        log_every_n_steps=1,
        default_root_dir=options.folder,
        callbacks=[Book(options.folder / f"{rank}.jsonl", -1), saving],
    )
    try:
        trainer.fit(made, data, ckpt_path=options.resume)
    except (ValueError, OSError) as error:
        if options.says is None:
            raise
        options.says.write_text(json.dumps([type(error).__name__, str(error)]))
        sys.exit(1)
    if options.hf:
        made.save_pretrained(options.hf)


if __name__ == "__main__":
    train(parser().parse_args(sys.argv[1:]))
