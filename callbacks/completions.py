"""Show what the policy answers while it learns, and what each answer earned."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from PIL import Image

from avar_lightning.callbacks.outputs import log_pixels
from avar_lightning.files import write_jsonl
from avar_lightning.grpo import Rollouts

LONGEST = 400
"""Characters of a completion that are shown in TensorBoard; files hold all of it."""


class CompletionsCallback(Callback):
    """Write the completions of some prompts, with picture, answer, each part of the reward, and VAS.

    Every `every_n_batches`, for the first prompts of the first process: `<log_dir>/completions/step_XXXXXXXX.jsonl`
    with a line a completion, its pictures beside it as PNG, and in TensorBoard the table `completions` and the
    pictures `completions/prompt_N`. Loggers with WandbLogger's `log_table` get the table.

    Args:
        every_n_batches: Batches between two tables.
        num_prompts: Prompts in a table, each with all its completions.
    """

    def __init__(self, every_n_batches: int = 10, num_prompts: int = 2) -> None:
        for name, value in (("every_n_batches", every_n_batches), ("num_prompts", num_prompts)):
            if value < 1:
                raise ValueError(f"{name}={value}, expected 1 or more.")
        self.every_n_batches, self.num_prompts = every_n_batches, num_prompts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder; a collective call, as every process must ask the logger."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "completions"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the table of the batch."""
        rollouts = getattr(pl_module, "rollouts", None)
        if not isinstance(rollouts, Rollouts) or batch_idx % self.every_n_batches or not trainer.is_global_zero:
            return
        rows, step = rollouts.table(self.num_prompts), trainer.global_step
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures = [
            [(f"step_{step:08d}_prompt_{prompt}_{number}.png", image) for number, image in enumerate(images)]
            for prompt, images in enumerate(rollouts.prompts.images[: self.num_prompts])
        ]
        for name, image in (picture for own in pictures for picture in own):
            image.save(self.folder / name)
        lines = [{"step": step, **row, "images": [name for name, _ in pictures[row["prompt"]]]} for row in rows]
        write_jsonl(self.folder / f"step_{step:08d}.jsonl", lines)
        first = ((f"completions/prompt_{prompt}", own[0][1]) for prompt, own in enumerate(pictures) if own)
        log_pixels(trainer.loggers, ((name, _shown(image)) for name, image in first), step=step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("completions", markdown(rows), step)
            elif hasattr(logger, "log_table"):
                logger.log_table("completions", columns=list(rows[0]), data=[list(row.values()) for row in rows])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each prompt."""
    parts = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        own = [row for row in rows if row["prompt"] == prompt]
        told = ("prompt", "id", "question", "answer", "completion")
        names = [*(name for name in own[0] if name not in told), "completion"]
        parts.append(f"**prompt_{prompt}** {_text(own[0]['question'])}\n\nanswer: **{_text(own[0]['answer'])}**\n")
        parts.append("\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|"]))
        parts[-1] += "".join(f"\n| {' | '.join(_text(row[name]) for name in names)} |" for row in own) + "\n"
    return "\n".join(parts)


def _text(value: Any) -> str:
    """One cell: tags must be seen and not taken for mark-up, and a table's row is a line."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = html.escape(str(value), quote=False).replace("|", "&#124;")
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _shown(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))
