"""Write a Hugging Face folder that is whole and right or not there: it is opened again before it gets its name."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from avar_lightning.checkpoints import replaced

ADAPTERS = "adapter_model.safetensors"
HINT = "free space, or choose another folder; what was there before is whole."
# What logits may differ by after a round trip, as a share of the largest.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def write_folder(
    folder: str | Path, model: Any, processor: ProcessorMixin, *, card: str, run: Path | None = None, **options: Any
) -> Path:
    """Write model (with PEFT: adapters), processor, model card and the run's configuration.

    Args:
        folder: Where; what is there now is replaced when the new one is whole.
        model: A Hugging Face model, or one of PEFT.
        processor: Its processor.
        card: Text of README.md.
        run: Folder of the training run, whose config.yaml is copied.
        **options: For the model's `save_pretrained`: gathered weights, where processes share them.
    """
    with replaced(folder, HINT) as unfinished:
        fill(unfinished, model, processor, card=card, run=run, **options)
    return Path(folder)


def fill(folder: Path, model: Any, processor: Any, *, card: str, run: Path | None = None, **options: Any) -> None:
    """The same without anything to replace: into an empty place."""
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    if getattr(processor, "video_processor", None) is None and _knows_videos(type(processor)):
        # Loaded without torchvision, it says nothing of videos; where there is, this file is asked for them.
        processor.image_processor.save_pretrained(folder)
    (folder / "README.md").write_text(card)
    if run is not None and (run / "config.yaml").is_file():
        shutil.copyfile(run / "config.yaml", folder / "config.yaml")
    for file in folder.iterdir():  # safetensors lets nobody else read
        file.chmod((folder / "README.md").stat().st_mode)


def anatomy(model: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a model's state, by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def reopen(folder: Path, wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> PreTrainedModel:
    """Open a folder as anybody would, and compare every key, shape and dtype with what it was written from.

    Raises:
        ValueError: They differ.
    """
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    found = anatomy(model)
    wrong = {name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in map(str, info[kind])}
    wrong |= {name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)}
    if wrong:
        _differs(f"{len(wrong)} keys, the first {sorted(wrong)[0]!r}")
    opened: PreTrainedModel = model.eval()
    return opened


def compare_adapters(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    """Compare a folder's adapters with those that it was written from, every one and bit for bit.

    Raises:
        ValueError: They differ.
    """
    with safe_open(folder / ADAPTERS, framework="pt") as file:
        found = set(file.keys())
        wrong = sorted(found ^ wanted.keys()) or [
            name for name in sorted(found) if not torch.equal(file.get_tensor(name), wanted[name].detach().cpu())
        ]
    if wrong:
        _differs(f"{len(wrong)} adapters, the first {wrong[0]!r}")


@torch.no_grad()
def answer_logits(model: PreTrainedModel | PeftModel, processor: Any) -> Tensor:
    """Logits of one image and a question, float32 (tokens, vocabulary)."""
    image = Image.linear_gradient("L").convert("RGB")
    parts = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    logits: Tensor = model(**inputs, use_cache=False).logits[0].float()
    return logits


def compare_logits(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of logits, as a share of the largest logit.

    Raises:
        ValueError: It is beyond rounding.
    """
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE[dtype]:
        _differs(f"{difference:.2g} of the largest logit, expected at most {TOLERANCE[dtype]:g}")
    return difference


def _knows_videos(kind: type[ProcessorMixin]) -> bool:
    """Whether a processor's class, or that behind an image-only one, takes a video processor."""
    return any("video_processor" in inspect.signature(each).parameters for each in kind.__mro__[:-1])


def _differs(what: str) -> None:
    raise ValueError(
        f"The exported model is not what it was made from: it differs by {what}; nothing was written or replaced, "
        "report this with the versions of torch and transformers."
    )
