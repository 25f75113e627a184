"""`avar export` without its command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict

from avar_lightning.checkpoints import recover, replaced
from avar_lightning.export.card import model_card
from avar_lightning.export.folder import HINT, anatomy, answer_logits, compare_adapters, compare_logits, fill, reopen
from avar_lightning.export.sources import Source, open_source


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
    """Compare logits too, on the CPU: of the written model, and those of merged adapters with adapters'."""
    overwrite: bool = False
    """Replace an exported model that is there."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        tensors: How many, all of which were compared.
        parameters: Values in them.
        difference: Of logits by merging or by opening again, whichever is larger, as a share of the largest logit; None
            where they were not compared.
        merged: Whether adapters were added to the weights.
    """

    folder: Path
    tensors: int
    parameters: int
    difference: float | None
    merged: bool


def export(config: ExportConfig) -> Exported:
    """Write a Hugging Face folder, open it again, compare, and only then give it its name; memory holds the model once.

    Raises:
        FileExistsError: There is something in the way.
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint does not fit its model, or the folder does not open as what was written.
    """
    folder = Path(config.output).expanduser()
    recover(folder)
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
    with replaced(folder, HINT) as unfinished:
        if config.merge:
            tensors, parameters, difference = _write_model(unfinished, source, config, card)
            return Exported(folder, tensors, parameters, difference, adapted)
        fill(unfinished, source.model, source.processor, card=card, run=source.run)
        adapters = get_peft_model_state_dict(source.model)
        compare_adapters(unfinished, adapters)
        return Exported(folder, len(adapters), sum(t.numel() for t in adapters.values()), None, False)


def _write_model(folder: Path, source: Source, config: ExportConfig, card: str) -> tuple[int, int, float | None]:
    """Write a whole model and compare; gives its tensors, its parameters and the largest difference of logits."""
    differences, processor = list[float](), source.processor
    model, source.model = source.model, None  # which is to go before it is opened again
    if isinstance(model, PeftModel):
        before = answer_logits(model, processor) if config.check else None
        model = model.merge_and_unload(safe_merge=True)
        if before is not None:
            differences.append(compare_logits(answer_logits(model, processor), before, model.dtype))
    if config.dtype:
        _cast(model, getattr(torch, config.dtype))
    logits = answer_logits(model, processor) if config.check else None
    fill(folder, model, processor, card=card, run=source.run)
    wanted, dtype = anatomy(model), model.dtype
    del model
    opened = reopen(folder, wanted)
    if logits is not None:
        differences.append(compare_logits(answer_logits(opened, processor), logits, dtype))
    return len(wanted), opened.num_parameters(), max(differences, default=None)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast what is written, in place; what is made anew at opening (angles of positions) keeps its own dtype."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


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
