"""A GRPO step beside TRL's GRPOTrainer: same model, prompts, pictures, group size, lengths and micro-batches.

Every contestant is its own trainer in this process; they take turns, one step each, round after round, and each time is
divided by TRL's of its round. A step is everything from one optimizer step to the next: data, rollout, reward,
log-probabilities, update. Writes a CSV and a table to benchmarks/results/.

    python benchmarks/grpo_step.py
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import trl
from datasets import Dataset
from measuring import about, as_cell, page, paired, write
from trl import GRPOTrainer
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from turns import OurTurn, TheirTurn, Turns, take_turns

from avar_lightning import GRPOModule, load_model
from avar_lightning.data import DemoDataModule
from avar_lightning.data.demo import demo_samples
from avar_lightning.grpo import GRPOConfig
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.processing import load_processor
from avar_lightning.rewards import RewardConfig, VisualAttentionReward, accuracy_reward
from avar_lightning.rollout import HFRolloutEngine, SamplingConfig

REFERENCE = "TRL"
STAGES = ("rollout", "reward", "score", "update")
SAMPLES = 256


def note(module: L.LightningModule) -> dict[str, float]:
    """Mean tokens of the last rollout, and the seconds of each stage."""
    lengths = [len(tokens) for tokens in module.rollouts.token_ids]
    seconds = {name: float(module.trainer.callback_metrics[f"time/{name}_s"]) for name in STAGES}
    return {"length": sum(lengths) / len(lengths)} | seconds


def ours(args: argparse.Namespace, turns: Turns, name: str, visual: VisualAttentionReward | None) -> Callable[[], None]:
    """One of our trainers, to be called in its thread."""
    module = GRPOModule(
        VLMConfig(args.model),
        GRPOConfig(num_generations=args.generations, micro_batch_size=args.micro_batch, vas_every=0),
        SamplingConfig(max_new_tokens=args.new_tokens),
        [RewardConfig(accuracy_reward)],
        visual,
        HFRolloutEngine(),
        OptimizerConfig(lr=1e-6, warmup_fraction=0.0, weight_decay=0.0),
    )
    module.configure_model()  # here: loading is not safe beside another thread that loads
    data = DemoDataModule(
        args.data, num_train=SAMPLES, num_val=8, train_prompts=True, batch_size=args.prompts, num_workers=0
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OurTurn(turns, name, note)],
    )
    return lambda: trainer.fit(module, data)


def theirs(args: argparse.Namespace, turns: Turns) -> Callable[[], None]:
    """TRL's trainer on the same questions."""
    samples = list(demo_samples(SAMPLES, style="anchored", hint_rate=0.8, seed=0, split="train"))
    rows = [
        {"prompt": sample.messages[:-1], "images": sample.images, "answer": str(sample.answer)} for sample in samples
    ]
    for row in rows:
        system = row["prompt"][0]
        row["prompt"] = [{**system, "content": [{"type": "text", "text": system["content"]}]}, *row["prompt"][1:]]
    lengths: list[float] = []

    def reward(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        return accuracy_reward(completions, answer)

    batch = args.prompts * args.generations
    config = TRLConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=batch // args.micro_batch,
        num_generations=args.generations,
        max_completion_length=args.new_tokens,
        max_steps=args.steps,
        learning_rate=1e-6,
        loss_type="grpo",
        beta=0.0,
        epsilon=0.2,
        scale_rewards="group",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        mask_truncated_completions=False,
    )
    trainer = GRPOTrainer(
        model=load_model(args.model).train(),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_processor(args.model),
        callbacks=[TheirTurn(turns, REFERENCE, lambda: {"length": lengths[-1] if lengths else math.nan})],
    )
    return trainer.train


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: seconds of a step, and the ratio to TRL's of the same round."""
    cells = [
        [
            row["trainer"],
            f"{1 / row['seconds_p50']:.2f}",
            as_cell(row, "seconds"),
            as_cell(row, "ratio"),
            f"{row['mean_length']:.1f}",
            *(str(row[f"{stage}_percent"]) for stage in STAGES),
        ]
        for row in rows
    ]
    return page(
        "A GRPO step beside TRL's",
        settings,
        "Seconds of a step and their ratio to TRL's step of the same round, p50 (p20 to p80).",
        ["trainer", "steps per second", "seconds", "ratio to TRL", "mean length", *(f"{name} (%)" for name in STAGES)],
        cells,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo_sft")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of each")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions in one forward with a gradient")
    parser.add_argument("--steps", type=int, default=12, help="timed rounds, and two more to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    warm_up, args.steps = 2, args.steps + 2
    torch.set_num_threads(args.threads)
    turns = Turns([REFERENCE, "ours", "ours with VARS"])
    work = {
        REFERENCE: theirs(args, turns),
        "ours": ours(args, turns, "ours", None),
        "ours with VARS": ours(args, turns, "ours with VARS", VisualAttentionReward()),
    }
    take_turns(turns, work)
    seconds = {name: taken[warm_up:] for name, taken in turns.seconds.items()}
    rows = []
    for name in turns.names:
        notes = turns.notes[name][warm_up:]
        row = {"trainer": name, "mean_length": round(sum(each["length"] for each in notes) / len(notes), 1)}
        for stage in STAGES:  # TRL does not tell its own
            row[f"{stage}_percent"] = (
                round(100 * sum(each[stage] for each in notes) / sum(seconds[name]), 1) if stage in notes[0] else ""
            )
        rows.append(row | paired(seconds, name, REFERENCE))
        print(rows[-1], flush=True)
    names = ("prompts", "generations", "new_tokens", "micro_batch")
    settings = {name: getattr(args, name) for name in names} | about("cpu", args.threads)
    settings |= {"trl": trl.__version__, "rounds": args.steps - warm_up}
    write(args.output / "grpo_step_cpu.csv", rows, settings, table(rows, settings))


if __name__ == "__main__":
    main()
