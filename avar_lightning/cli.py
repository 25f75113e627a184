"""The command line: LightningCLI with this project's wiring, a summary at the end, and errors of one sentence."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

PACKAGE_FOLDERS = (str(Path(__file__).parent), str(Path(__file__).parents[1] / "callbacks"))
SUMMARY_ROWS = (
    ("accuracy", "val/accuracy", "{:.3f}"),
    ("VAS of user tokens", "val/vas", "{:.2f}"),
    ("VAS of responses", "val/vas_response", "{:.2f}"),
    ("  ratio of means", "val/vas_ratio_of_means_response", "{:.2f}"),
    ("image share, responses", "val/image_share_response", "{:.3f}"),
    ("LM loss", "val/loss", "{:.3f}"),
)


class AvarCLI(LightningCLI):
    """LightningCLI that gives data the model's processor, exports a Hugging Face folder and prints a summary."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One processor for model and data."""
        parser.link_arguments("model.init_args.vlm.pretrained", "data.init_args.processor")

    def before_fit(self) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def after_fit(self) -> None:
        """Export the model and say what training did."""
        seconds = time.monotonic() - self.started
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        exported = _export(self.trainer, self.model, folder / "hf")
        before, after = measurements(self.trainer)
        if rank_zero_only.rank == 0 and folder.is_dir():
            summary = {"before": before, "after": after, "steps": self.trainer.global_step, "seconds": seconds}
            partial = folder / "summary.json.tmp"
            partial.write_text(json.dumps(summary, indent=1) + "\n")
            partial.replace(folder / "summary.json")
        rank_zero_info(summary_table(self.trainer, before, after, seconds, exported))


def _export(trainer: L.Trainer, model: L.LightningModule, folder: Path) -> Path | None:
    """Write the Hugging Face folder where one process holds the whole weights; `None` under sharding."""
    sharded = any(name in type(trainer.strategy).__name__ for name in ("FSDP", "ModelParallel", "DeepSpeed"))
    if sharded or trainer.fast_dev_run or not hasattr(model, "save_pretrained"):
        return None
    if rank_zero_only.rank == 0:
        model.save_pretrained(folder)
    return folder


def measurements(trainer: L.Trainer) -> tuple[dict[str, float], dict[str, float]]:
    """What was measured before training (by a callback that keeps a `baseline`) and last."""
    before = next((c.baseline for c in trainer.callbacks if getattr(c, "baseline", None)), {})
    after = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: float(value) for name, value in before.items()}, after


def summary_table(
    trainer: L.Trainer, before: dict[str, float], after: dict[str, float], seconds: float, exported: Path | None
) -> str:
    """A short table: each measured value before and after training, and where things are."""
    lines = ["", f"{'':<26}{'before':>10}{'after':>10}", "─" * 46]
    for label, name, form in SUMMARY_ROWS:
        if name in after:
            start = form.format(before[name]) if name in before else "–"
            lines.append(f"{label:<26}{start:>10}{form.format(after[name]):>10}")
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or "none"
    lines += [
        "─" * 46,
        f"steps        {trainer.global_step} in {seconds:.0f} s",
        f"model        {exported or 'avar export of the checkpoint'} (Hugging Face format)",
        f"checkpoint   {checkpoint}",
        f"TensorBoard  tensorboard --logdir {trainer.log_dir}",
    ]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> int:
    """Run `fit`, `validate`, `test` or `predict`; returns the exit status.

    0 when done, 1 when input or environment is at fault (one sentence on stderr), 2 for wrong usage.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        AvarCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception) -> str | None:
    """The message of an error that this package raised on purpose; `None` for a fault, which keeps its traceback."""
    text = str(error)
    if "Original Traceback" in text:  # raised in a DataLoader worker: the message ends with the original one
        ours = any(f'File "{folder}' in text.rsplit("\n  File", 2)[-1] for folder in PACKAGE_FOLDERS)
        return text.strip().splitlines()[-1].partition(": ")[2] if ours else None
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = frame.filename.startswith(PACKAGE_FOLDERS) and (frame.line or "").startswith("raise")
    return text if ours else None
