"""A whole SFT step: plain, guided, guided as the published code does it, and TRL's SFTTrainer, on the same batch.

Every contestant is its own trainer in this process; they take turns, one step each, round after round, and each time is
divided by the plain step's of its round. A step is everything from one optimizer step to the next. Peaks come from
processes of their own, of a training of two steps. Writes a CSV and a table to benchmarks/results/.

    python benchmarks/sft_step.py
    python benchmarks/sft_step.py --device cuda --dtype bfloat16 --cases 7b-4-4096

A case is SIZE-LAYERS-LENGTH of `subjects.SIZES`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import subjects
import torch
import trl
from datasets import Dataset
from measuring import about, as_cell, clock, hush, in_process, page, paired, parser_of, peak_of, write
from subjects import Case
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer
from turns import OurTurn, TheirTurn, Turns, take_turns

from avar_lightning import SFTModule
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.losses import attention_guidance_loss
from avar_lightning.module import NOT_MODEL_INPUTS, OptimizerConfig
from avar_lightning.processing import load_processor
from avar_lightning.roles import Role

WARM_UP = 1
GUIDANCE = {
    "plain": GuidanceConfig(form="none"),
    "hinge, Q = T": GuidanceConfig(form="hinge", queries=["response"]),
    "published, Q = U": GuidanceConfig(form="published", queries=["user"]),
    "eager, published, Q = U": GuidanceConfig(form="published", queries=["user"]),
}
CONTESTANTS = (*GUIDANCE, "TRL")


class EagerGuided(SFTModule):
    """Guidance from the attention matrices of every layer, as the published code has it."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """LM loss plus guidance of one batch."""
        inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
        out = self.model(**inputs, output_attentions=True, use_cache=False)
        roles, config = batch["role_ids"], self.guidance
        groups = torch.stack([roles == role for role in (Role.IMAGE, Role.SYSTEM)], dim=-1)
        queries = torch.isin(roles, torch.tensor(config.query_roles, device=roles.device))
        rows = queries[0].nonzero().squeeze(-1)  # of the only sample
        masses = torch.stack([each[:, :, rows].float() @ groups[:, None].float() for each in out.attentions])
        enhance, suppress = attention_guidance_loss(
            masses[..., 0], masses[..., 1], queries[:, rows], *groups.sum(1).unbind(-1)
        )
        return out.loss + config.alpha * enhance + config.beta * suppress


def model_of(args: argparse.Namespace, case: Case, name: str) -> nn.Module:
    """The same weights for every contestant."""
    attention = "eager" if name.startswith("eager") else args.attn
    return case.build(attention, device=args.device, dtype=args.dtype).train()


def ours(args: argparse.Namespace, case: Case, name: str, steps: int, *callbacks: L.Callback) -> Callable[[], Any]:
    """One of our trainings, to be called."""
    kind = EagerGuided if name.startswith("eager") else SFTModule
    module = kind(guidance=GUIDANCE[name], optimizer=OptimizerConfig(lr=1e-5, warmup_fraction=0.0, weight_decay=0.0))
    module.load = lambda: model_of(args, case, name)
    module.configure_model()  # here: loading is not safe beside another thread that loads
    trainer = L.Trainer(
        accelerator="cpu" if args.device == "cpu" else "gpu",
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    batches = DataLoader([subjects.make_batch(case.length)] * steps, batch_size=None)
    return lambda: trainer.fit(module, batches)


def theirs(args: argparse.Namespace, case: Case, steps: int, *callbacks: Any) -> Callable[[], Any]:
    """TRL's, on the same batch."""
    batch = subjects.make_batch(case.length)
    inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        max_steps=steps,
        learning_rate=1e-5,
        max_grad_norm=1.0,
        optim="adamw_torch",
        max_length=None,
        gradient_checkpointing=False,
        use_cpu=args.device == "cpu",
        bf16=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model_of(args, case, "TRL"),
        args=config,
        train_dataset=Dataset.from_dict({"labels": [[0]] * steps}),
        data_collator=lambda rows: dict(inputs),
        processing_class=load_processor("demo"),
        callbacks=list(callbacks),
    )
    return trainer.train


def measure_seconds(args: argparse.Namespace, case: Case) -> dict[str, list[float]]:
    """Seconds of every contestant in turn."""
    turns, steps = Turns(list(CONTESTANTS), partial(clock, args.device)), args.repeats + WARM_UP
    work = {name: ours(args, case, name, steps, OurTurn(turns, name)) for name in GUIDANCE}
    work["TRL"] = theirs(args, case, steps, TheirTurn(turns, "TRL"))
    take_turns(turns, work)
    return {name: seconds[WARM_UP:] for name, seconds in turns.seconds.items()}


def measure_memory(args: argparse.Namespace, case: Case, name: str) -> float:
    """Peak of a training of two steps above the model, in this process."""
    work = theirs(args, case, 2) if name == "TRL" else ours(args, case, name, 2)
    return peak_of(work, args.device)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements, one row a case and contestant."""
    rows = []
    for text, case in [(text, Case.without_image(text)) for text in args.cases]:
        seconds = in_process(f"{text}:seconds")
        for name in CONTESTANTS:
            row = {"size": case.size, "layers": case.layers, "length": case.length, "trainer": name}
            row["peak_mib"] = round(in_process(f"{text}:{name}"), 1)
            rows.append(row | paired(seconds, name, "plain"))
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: seconds, ratios and peaks."""
    lines = []
    for row in rows:
        case = row["size"], row["layers"], row["length"]
        plain = next(r for r in rows if (r["size"], r["layers"], r["length"]) == case and r["trainer"] == "plain")
        cells = [*map(str, case), row["trainer"], as_cell(row, "seconds"), as_cell(row, "ratio")]
        lines.append([*cells, f"{row['peak_mib']:.0f}", f"{row['peak_mib'] / plain['peak_mib']:.2f}"])
    return page(
        "A whole SFT step",
        settings,
        "Ratios are to the plain step of the same round, p50 (p20 to p80). A quarter of the tokens is the image, 5 of "
        "8 are response. Q is whose attention is guided; eager is guided as the published code does it, and logs "
        "nothing about attention, as TRL.",
        ["model", "layers", "N", "trainer", "seconds", "ratio to plain", "peak MiB", "to plain"],
        lines,
    )


def main() -> None:
    """Measure everything, or one thing in a process of its own."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=["small-4-512", "small-4-2048", "medium-8-2048"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attn", default="sdpa", help="attention of all but the eager one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    if args.measure is None:
        settings = {"dtype": args.dtype, "attn": args.attn, "repeats": args.repeats}
        settings |= about(args.device, args.threads) | {"trl": trl.__version__}
        rows = run(args)
        write(args.output / f"sft_step_{args.device}.csv", rows, settings, table(rows, settings))
        return
    text, what = args.measure.split(":", 1)
    case = Case.without_image(text)
    print(json.dumps(measure_seconds(args, case) if what == "seconds" else measure_memory(args, case, what)))


if __name__ == "__main__":
    main()
