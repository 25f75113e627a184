"""`avar export` without its command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict

from avar_lightning.export.card import model_card
from avar_lightning.export.folder import (
    anatomy,
    answer_logits,
    compare_adapters,
    compare_logits,
    reopen,
    write_folder,
)
from avar_lightning.export.sources import open_source


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and how."""

    checkpoint: str
    """A .ckpt file, a folder that FSDP wrote, a run's folder, a folder or hub name of Hugging Face, or adapters."""
    output: str
    """The folder to write."""
    merge: bool = True
    """Add adapters to the weights; otherwise they are written as they are."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; the checkpoint's own when unset."""
    pick: Literal["auto", "best", "last"] = "auto"
    """Which checkpoint of a run: `auto` is the best where a metric was monitored, else the last."""
    check: bool = False
    """Compare logits before and after too, on the CPU."""
    overwrite: bool = False
    """Replace an exported model that is there."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        tensors: How many, all of which were compared.
        parameters: Values in them.
        difference: Of logits, as a share of the largest one; None where they were not compared.
        merged: Whether adapters were added to the weights.
    """

    folder: Path
    tensors: int
    parameters: int
    difference: float | None
    merged: bool


def export(config: ExportConfig) -> Exported:
    """Write a Hugging Face folder, open it again and compare; memory holds the model once.

    Raises:
        FileExistsError: There is something in the way.
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint does not fit its model, or the folder does not open as what was written.
    """
    folder = Path(config.output).expanduser()
    _refuse_existing(folder, config)
    source = open_source(config.checkpoint, merge=config.merge, pick=config.pick)
    adapted = isinstance(source.model, PeftModel)
    if not config.merge and not adapted:
        raise ValueError(
            f"{config.checkpoint!r} has no adapters that could be written alone, expected a checkpoint of a run with "
            "vlm.lora; leave --no-merge out."
        )
    about: dict[str, Any] = {"base": source.base, "run": source.run, "settings": source.settings}
    card = model_card(source.name or folder.name, adapters=not config.merge, **about)
    if not config.merge:
        write_folder(folder, source.model, source.processor, card=card, run=source.run)
        adapters = get_peft_model_state_dict(source.model)
        compare_adapters(folder, adapters)
        return Exported(folder, len(adapters), sum(t.numel() for t in adapters.values()), None, False)
    wanted_logits = answer_logits(source.model, source.processor) if config.check else None
    merged = source.model.merge_and_unload(safe_merge=True) if adapted else source.model
    model = merged.to(getattr(torch, config.dtype)) if config.dtype else merged
    write_folder(folder, model, source.processor, card=card, run=source.run)
    wanted, dtype, processor = anatomy(model), model.dtype, source.processor
    del model, merged, source  # before it is opened again
    opened = reopen(folder, wanted)
    difference = None
    if wanted_logits is not None:
        difference = compare_logits(folder, answer_logits(opened, processor), wanted_logits, dtype)
    return Exported(folder, len(wanted), opened.num_parameters(), difference, adapted)


def _refuse_existing(folder: Path, config: ExportConfig) -> None:
    if not folder.exists():
        return
    ours = folder.is_dir() and any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.resolve() == Path(config.checkpoint).expanduser().resolve():
        raise FileExistsError(f"{str(folder)!r} is what is to be exported; give another folder.")
    if not empty and not (ours and config.overwrite):
        fix = "pass --overwrite to replace it" if ours else "it is no exported model, so give another folder"
        raise FileExistsError(f"{str(folder)!r} exists; {fix}.")
