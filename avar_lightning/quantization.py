"""The language model's frozen weights in 4 bits (QLoRA): bitsandbytes, as transformers loads it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

# Weights that share a scale. On a CPU bitsandbytes 0.50 reads weights wrongly, without a word, where a row ends within
# such a block; which layers are in 4 bits should not depend on the device.
BLOCK = 64


@dataclass
class QuantizationConfig:
    """4-bit weights of the language model's linear layers, for `lora` to train on.

    Vision tower, projector, embeddings, norms and output head keep `vlm.dtype`: attention to the image starts from what
    they say, and together they are the smaller part.
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of a weight: quantiles of a normal distribution (QLoRA), or 4-bit floats."""
    double_quant: bool = True
    """Quantise the scales too: 0.127 bits a weight for them instead of 0.5."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of products with these weights; `vlm.dtype` when unset."""
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Dtype whose bytes hold the packed values; changes no value, for tools that move weights by dtype."""
    skip: list[str] = field(default_factory=list)
    """Regular expressions, searched in module names, of linear layers that keep `vlm.dtype` (e.g. "layers\\.0\\.")."""


def quantization_plan(skeleton: PreTrainedModel, config: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers must be told to quantise the language model's linear layers and nothing else.

    Args:
        skeleton: The model, on any device; only the names and types of its modules are asked.
        config: What is wanted.
        dtype: Of weights that are not quantised.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: The checkpoint is quantised already, a `skip` pattern matches no linear layer of the language model,
            or they match all.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "vlm.quantization needs bitsandbytes, which is not installed; pip install 'avar-lightning[qlora]'."
        ) from error
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise ValueError(
            f"The weights of {skeleton.config.name_or_path!r} are quantised already, expected full precision for "
            "vlm.quantization; give the checkpoint that they were made from, or leave vlm.quantization out."
        )
    decoder = skeleton.get_decoder()
    prefix = next(name for name, module in skeleton.named_modules() if module is decoder)
    linear = {f"{prefix}.{name}": module for name, module in decoder.named_modules() if type(module) is nn.Linear}
    for pattern in config.skip:
        if not any(re.search(pattern, name) for name in linear):
            raise ValueError(
                f"quantization.skip pattern {pattern!r} matches no linear layer of the language model of "
                f"{type(skeleton).__name__}, expected a regular expression found in names like "
                f"{next(iter(linear), prefix)!r}; correct or remove it."
            )
    chosen = [name for name in linear if not any(re.search(pattern, name) for pattern in config.skip)]
    uneven = [name for name in chosen if linear[name].in_features % BLOCK]
    if len(uneven) == len(chosen):
        raise ValueError(
            f"quantization.skip={config.skip} leaves none of the {len(linear)} linear layers of "
            f"{type(skeleton).__name__}'s language model to quantise (rows must be multiples of {BLOCK} weights); "
            "shorten it, or leave vlm.quantization out."
        )
    if uneven:
        rank_zero_warn(
            f"{len(uneven)} of {len(linear)} linear layers of the language model (such as {uneven[0]}, "
            f"{linear[uneven[0]].in_features} weights a row) keep {dtype}: rows must be multiples of {BLOCK} weights."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype) if config.compute_dtype else dtype,
        bnb_4bit_quant_storage=getattr(torch, config.quant_storage),
        # transformers matches from the start of a name: everything outside of the decoder, then what was asked for.
        llm_int8_skip_modules=[
            rf"(?!{re.escape(prefix)}\.).*",
            *(f".*(?:{pattern}).*" for pattern in config.skip),
            *map(re.escape, uneven),
        ],
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Let 4-bit weights on a CPU stay as they are trained.

    On a CPU with bfloat16 instructions bitsandbytes 0.50 packs them anew in the first evaluation, for a product in
    bfloat16 that has no backward: answers change, and nothing trains any more.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantize_skeleton(skeleton: PreTrainedModel, plan: BitsAndBytesConfig) -> PreTrainedModel:
    """The 4-bit model on the meta device: every weight in the shape and dtype that it has after loading, in place.

    The scales (with `double_quant` 0.127 bits a weight, else 0.5) are no parameters, there as little as after loading.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = skeleton.dtype
    quantizer: Any = AutoHfQuantizer.from_config(plan)
    quantizer.preprocess_model(skeleton, device_map=None)
    for module in skeleton.modules():
        if isinstance(module, Linear4bit):
            own: Any = module.weight
            size = -(-own.numel() // 2) // own.quant_storage.itemsize
            packed = torch.empty(size, 1, dtype=own.quant_storage, device="meta")
            module.weight = Params4bit(packed, **own.__dict__ | {"bnb_quantized": True})
            if module.bias is not None:  # transformers makes it anew, in the default dtype
                module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    quantizer.postprocess_model(skeleton)
    return skeleton
