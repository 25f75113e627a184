"""Adapters added to the full-precision weights that they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel

from avar_lightning.model import VLMConfig, load_model


def merge_adapters(
    adapters: str | Path | Mapping[str, Tensor],
    base: VLMConfig | str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> PreTrainedModel:
    """A plain Hugging Face model whose weights are `base` plus adapters, in full precision.

    The base is loaded without its `quantization`, so a merged weight is rounded once, to `dtype`, and never to 4 bits.
    (Adapters of a 4-bit run were trained on rounded weights: docs/qlora.md says what changes.)

    Args:
        adapters: A folder that PEFT wrote, or the adapters in the state of a checkpoint, under Lightning's names.
        base: Where the weights are; for a state also its `lora`.
        dtype: Of the merged weights.

    Raises:
        FileNotFoundError: There are no adapters in the folder.
        ValueError: Adapters are missing, unknown or of another shape than the base has room for.
    """
    config = VLMConfig(base) if isinstance(base, str) else base
    plain = replace(config, dtype=dtype, quantization=None, gradient_checkpointing=False, freeze=[])
    if isinstance(adapters, Mapping):
        if plain.lora is None:
            raise ValueError(
                f"Adapters of a checkpoint are to be merged into {plain.pretrained!r}, and its vlm.lora is not set, "
                "expected the one that they were trained with; give it."
            )
        adapted = load_model(plain)
        given = {_peft_name(name): tensor for name, tensor in adapters.items() if ".lora_" in name}
    else:
        folder = str(adapters)
        if not (Path(folder) / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(
                f"No adapters at {folder!r}: expected a folder with an adapter_model.safetensors; check the path."
            )
        adapted = get_peft_model(load_model(replace(plain, lora=None)), PeftConfig.from_pretrained(folder))
        given = load_peft_weights(folder, device="cpu")
    assert isinstance(adapted, PeftModel)
    wanted = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
    misfits = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != _shape(given.get(name)))
    if misfits:
        raise ValueError(
            f"{len(misfits)} adapters (the first is {misfits[0]!r}) are missing, unknown or of another shape than "
            f"{plain.pretrained!r} has room for, expected those of this base and no others; give the base and the lora "
            "that they were trained with."
        )
    set_peft_model_state_dict(adapted, given)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged.eval().requires_grad_(False)


def _peft_name(name: str) -> str:
    """A parameter's name in a checkpoint of Lightning, as PEFT writes it to a folder.

    >>> _peft_name("model.base_model.model.q_proj.lora_A.default.weight")
    'base_model.model.q_proj.lora_A.weight'
    """
    return name.removeprefix("model.").replace(".default.", ".")


def _shape(tensor: Tensor | None) -> object:
    return None if tensor is None else tensor.shape
