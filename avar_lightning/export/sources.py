"""What can be exported, opened: checkpoints of Lightning of every kind, folders of Hugging Face and PEFT, runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import init_empty_weights
from peft import PeftConfig
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, ProcessorMixin

from avar_lightning.attention import find_vlm
from avar_lightning.checkpoints import (
    IMAGE_SIZE,
    Contents,
    is_checkpoint,
    load_weights,
    look_into,
    plain_name,
    recover,
    refuse_other,
)
from avar_lightning.merging import merge_adapters
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import load_processor, looks_like_path, resolve_pretrained

PREFIX = "model."  # of the model's weights in the training module


@dataclass
class Source:
    """A model on the CPU with what belongs to it.

    Attributes:
        model: A Hugging Face model; one of PEFT where adapters are not merged.
        processor: Its processor, with the limits on pixels of its training.
        base: Folder or hub name of the model that training began with.
        settings: Configuration of the training module.
        run: Folder of the training run.
        name: What to call it.
    """

    model: Any
    processor: ProcessorMixin
    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    name: str = ""


def open_source(path: str, *, merge: bool = True, pick: str = "auto") -> Source:
    """Open whatever `path` is; adapters lie on their base, and are to be merged unless they are already.

    Args:
        path: A .ckpt file, a folder that FSDP wrote, a run's folder, a folder or hub name of Hugging Face, or a folder
            of adapters.
        merge: Whether adapters will be merged: otherwise the base of 4-bit ones is not loaded.
        pick: `best`, `last`, or `auto` for the best where a metric was monitored: which checkpoint of a run.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is something else, or does not fit its model.
    """
    place = Path(path).expanduser()
    recover(place)
    if (place / "checkpoints").is_dir():
        place = _of_run(place, pick)
    if is_checkpoint(place) or place.suffix == ".ckpt":
        return _of_lightning(look_into(place), merge=merge)
    if (place / "adapter_config.json").is_file():
        return _of_adapters(place)
    return _of_hugging_face(path, place)


def _of_run(run: Path, pick: str) -> Path:
    """The best or last checkpoint of a run."""
    for old in (run / "checkpoints").glob("*.ckpt.old"):
        recover(old.with_suffix(""))
    named = (path for path in (run / "checkpoints").glob("*.ckpt") if path.exists())  # a link may lead nowhere
    found = sorted(named, key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"The run {str(run)!r} has no checkpoint in {str(run / 'checkpoints')!r}; give another."
        )
    last = next((path for path in reversed(found) if path.stem.startswith("last")), found[-1])
    states = look_into(last).extra.get("callbacks", {}).values()
    best: dict[str, Any] = next((state for state in states if state.get("best_model_path")), {})
    if pick == "last" or (pick == "auto" and best.get("best_model_score") is None):
        return last
    path = Path(best.get("best_model_path", ""))
    # A resumed run leaves the best one in its earlier version's folder; all of them may have moved since.
    places = [path, run.absolute().parent.joinpath(*path.parts[-3:]), run / "checkpoints" / path.name]
    there = next((place for place in places if is_checkpoint(place)), None)
    if there is None:
        raise FileNotFoundError(f"The best checkpoint of {str(run)!r} is not at {str(path)!r}; use --pick last.")
    return there


def _of_lightning(contents: Contents, *, merge: bool) -> Source:
    settings = contents.extra.get("hyper_parameters", {})
    if "vlm" not in settings:
        raise ValueError(
            f"{str(contents.path)!r} is a checkpoint of another program, expected one of SFTModule or GRPOModule; "
            "export it with the module that wrote it."
        )
    vlm = VLMConfig(**settings["vlm"])
    plain = replace(vlm, quantization=None, gradient_checkpointing=False, freeze=[], attn_implementation="sdpa")
    weights = {plain_name(name): tensor for name, tensor in load_weights(contents).items()}
    if vlm.quantization and merge:
        model: Any = merge_adapters(weights, plain, dtype=vlm.dtype)
    else:
        # The checkpoint of a 4-bit run holds adapters alone.
        known = replace(contents, shapes={name: tensor.shape for name, tensor in weights.items()})
        model = _filled(_skeleton(plain), known, weights, partly=bool(vlm.quantization))
    run = next((p for p in contents.path.absolute().parents[:2] if (p / "config.yaml").is_file()), None)
    processor = load_processor(_own_processor(run) or vlm.pretrained)
    if contents.extra.get(IMAGE_SIZE):
        processor.image_processor.size = contents.extra[IMAGE_SIZE]
    name = f"{run.parent.name} {run.name}" if run else ""
    return Source(model, processor, vlm.pretrained, settings, run, name)


def _skeleton(vlm: VLMConfig) -> Any:
    """The model without weights, but with buffers, which no checkpoint keeps, and with its settings of generation."""
    with init_empty_weights(include_buffers=False):
        model: Any = load_model(replace(vlm, from_scratch=True))
    try:
        settings = GenerationConfig.from_pretrained(resolve_pretrained(vlm.pretrained))
    except OSError:  # a base need not have any
        return model
    (model.get_base_model() if vlm.lora else model).generation_config = settings
    return model


def _filled(model: Any, contents: Contents, weights: dict[str, Tensor], *, partly: bool) -> Any:
    """The same with the weights of a checkpoint, every one; they stay on the disk until they are used."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = model.state_dict().items()
    wanted = {PREFIX + name: each.shape for name, each in named if not partly or name in trained}
    refuse_other(contents, wanted)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    model.load_state_dict(state, strict=not partly, assign=True)
    find_vlm(model).tie_weights()
    return model.eval().requires_grad_(False)


def _of_adapters(folder: Path) -> Source:
    base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    model = merge_adapters(folder, base, dtype=_own_dtype(base))
    processor = load_processor(base)
    if (folder / "processor_config.json").is_file():
        config = yaml.safe_load((folder / "processor_config.json").read_text())
        processor.image_processor.size = config.get("image_processor", {}).get("size", processor.image_processor.size)
    return Source(model, processor, base, *_run_beside(folder))


def _of_hugging_face(path: str, folder: Path) -> Source:
    if (folder.exists() or looks_like_path(path)) and not (folder / "config.json").is_file():
        raise ValueError(
            f"{path!r} is nothing that can be exported, expected a .ckpt, a folder of FSDP, a run with a folder "
            "checkpoints, or a folder of Hugging Face or PEFT; check the path."
        )
    model = load_model(VLMConfig(path, dtype=_own_dtype(path)))
    return Source(model, load_processor(path), path, *(_run_beside(folder) if folder.is_dir() else ()))


def _run_beside(folder: Path) -> tuple[dict[str, Any], Path | None, str]:
    """What the run that wrote a folder at its end says of itself."""
    run = folder.absolute().parent
    if not (run / "config.yaml").is_file():
        return {}, None, folder.name
    settings = yaml.safe_load((run / "config.yaml").read_text()).get("model", {}).get("init_args", {})
    return settings, run, f"{run.parent.name} {run.name}"


def _own_processor(run: Path | None) -> str | None:
    """The processor that a run's configuration names."""
    if run is None:
        return None
    data = yaml.safe_load((run / "config.yaml").read_text()).get("data", {}).get("init_args", {})
    name = data.get("processor")
    return name if isinstance(name, str) else None


def _own_dtype(pretrained: str) -> Any:
    dtype = AutoConfig.from_pretrained(resolve_pretrained(pretrained)).dtype or torch.float32
    return str(dtype).removeprefix("torch.")
