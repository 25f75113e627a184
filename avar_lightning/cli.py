"""The command line: LightningCLI with this project's wiring, a summary at the end, and errors of one sentence."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from avar_lightning import strategies as strategies  # makes fsdp2 known to the Trainer
from avar_lightning.checkpoints import look_into
from avar_lightning.errors import OneSentence, told
from avar_lightning.files import write_json, write_jsonl
from avar_lightning.module import VLMModule

DEFAULT_PROCESSOR = "demo"
RESOLVED_LATER = ("last", "best", "hpc")  # names that Lightning gives to checkpoints
SUMMARY_ROWS = (
    ("mean reward", "reward/total", "{:.3f}"),
    ("accuracy", "val/accuracy", "{:.3f}"),
    ("VAS of user tokens", "val/vas_ratio_of_means", "{:.3g}"),
    ("  mean of ratios", "val/vas", "{:.3g}"),
    ("VAS of responses", "val/vas_ratio_of_means_response", "{:.3g}"),
    ("  mean of ratios", "val/vas_response", "{:.3g}"),
    ("image share, responses", "val/image_share_response", "{:.3f}"),
    ("LM loss", "val/loss", "{:.3f}"),
)


class AvarArgumentParser(OneSentence, LightningArgumentParser):
    """Says in one sentence what is wrong with a command line or configuration."""


class AvarCLI(LightningCLI):
    """LightningCLI that gives data the model's processor, exports a Hugging Face folder and prints a summary."""

    def before_instantiate_classes(self) -> None:
        """Give the data the processor of the model, unless it names one of its own.

        By hand: jsonargparse drops a link whose source lies inside a dataclass of a subclass, without a word.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        given = config.get("ckpt_path")
        if given not in (None, *RESOLVED_LATER) and "://" not in given:
            look_into(given)  # before anything is loaded
        vlm = config.model.init_args.get("vlm") if "init_args" in config.model else None
        data = config.data.get("init_args") if config.get("data") else None
        if vlm is None or data is None or "processor" not in data:
            return
        vlm = vlm.get("init_args", vlm)
        if data.processor == DEFAULT_PROCESSOR:
            data.processor = vlm.pretrained

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the trainer; what it does not take is said in one sentence."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise ValueError(" ".join(str(error).split())) from error

    def before_fit(self) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given: a checkpoint brings weights and state, not settings."""

    def after_predict(self) -> None:
        """Write what was predicted, one JSON object a line, beside the logs (one file for each process)."""
        trainer = self.trainer
        batches = trainer.predict_loop.predictions
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        path = folder / f"predictions_{trainer.global_rank}.jsonl"
        write_jsonl(path, (row for batch in batches for row in batch))
        rank_zero_info(f"predictions  {path}")

    def after_fit(self) -> None:
        """Export the model and say what training did."""
        trainer, seconds = self.trainer, time.monotonic() - self.started
        before, after = measurements(trainer)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        trying = getattr(trainer, "fast_dev_run", False)
        if not trying and trainer.is_global_zero:
            summary = {"before": before, "after": after, "steps": trainer.global_step, "seconds": seconds}
            write_json(folder / "summary.json", summary)
        exported = None if trying else export(trainer, self.model, folder)
        rank_zero_info(summary_table(trainer, before, after, seconds, exported))


def export(trainer: L.Trainer, model: L.LightningModule, run: Path) -> Path | None:
    """Write the model as a Hugging Face folder; `None` where its weights cannot be gathered (FSDP1, DeepSpeed)."""
    if not isinstance(model, VLMModule) or isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        return None
    return model.save_pretrained(run / "hf", run)


def measurements(trainer: L.Trainer) -> tuple[dict[str, float], dict[str, float]]:
    """What was measured before training (by a callback that keeps a `baseline`), and last.

    What a module measures in every batch is in its `trend`: means over the first and over the last of them.
    """
    baselines = (getattr(callback, "baseline", None) for callback in getattr(trainer, "callbacks", []))
    before: dict[str, float] = next((found for found in baselines if isinstance(found, dict)), {})
    before = {name: float(value) for name, value in before.items()}
    after = {name: float(value) for name, value in trainer.callback_metrics.items()}
    first, last = getattr(trainer.lightning_module, "trend", ({}, {}))
    return before | first, after | last


def summary_table(
    trainer: L.Trainer, before: dict[str, float], after: dict[str, float], seconds: float, exported: Path | None
) -> str:
    """A short table: each measured value before and after training, and where things are."""
    lines = ["", f"{'':<26}{'before':>10}{'after':>10}", "─" * 46]
    for label, name, form in SUMMARY_ROWS:
        if name in before or name in after:
            start, end = (form.format(found[name]) if name in found else "–" for found in (before, after))
            lines.append(f"{label:<26}{start:>10}{end:>10}")
    lines += ["─" * 46, f"steps        {trainer.global_step} in {seconds:.0f} s"]
    if getattr(trainer, "fast_dev_run", False):
        return "\n".join([*lines, "kept         nothing (fast_dev_run)"])
    saved = (getattr(trainer.checkpoint_callback, f"{which}_model_path", "") for which in ("best", "last"))
    lines += [
        f"model        {f'{exported} (Hugging Face format)' if exported else f'avar export {trainer.log_dir} DST'}",
        f"checkpoint   {next(filter(None, saved), 'none')}",
        f"TensorBoard  tensorboard --logdir {trainer.log_dir}",
    ]
    return "\n".join(lines)


def command_line(args: list[str] | None = None, *, kind: type[AvarCLI] = AvarCLI) -> AvarCLI:
    """Parse a command line and run it, or do what another `kind` does with what was parsed."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return kind(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_class=AvarArgumentParser,
        parser_kwargs={"prog": "train.py", "allow_abbrev": False},  # `avar doctor` reads its command lines too
        args=args,
    )


def main(args: list[str] | None = None) -> int:
    """Run `fit`, `validate`, `test` or `predict`; returns the exit status.

    0 when done, 1 when input or environment is at fault (one sentence on stderr), 2 for wrong usage.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command_line(args)
    except Exception as error:
        if not told(error):
            raise
        return 1
    return 0
