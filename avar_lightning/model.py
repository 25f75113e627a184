"""Load a vision-language model the way a training run needs it: attention kernel, adapters, frozen parts."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from avar_lightning.families import PARTS, adapt, family_of, part_pattern
from avar_lightning.processing import resolve_pretrained, tokenizer_of
from avar_lightning.quantization import QuantizationConfig, keep_layout, quantization_plan, quantize_skeleton


@dataclass
class LoRAConfig:
    """Low-rank adapters on the language model's linear layers (PEFT)."""

    r: int = 16
    """Rank of the adapters."""
    alpha: int = 32
    """Scale numerator: adapters are multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input, in [0, 1)."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names (ends) of the linear layers that get an adapter."""
    exclude: str | None = None
    """Regular expression of the full names of modules that never get one; by default vision tower and projector,
    however the model's family calls them."""


@dataclass
class VLMConfig:
    """Which vision-language model, and how to load it."""

    pretrained: str = "demo"
    """Folder, hub name, or "demo" for the small base that ships with the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights; keep float32 for full training under `trainer.precision: bf16-mixed`."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention kernel of transformers; guidance and VAS work beside each of them."""
    from_scratch: bool = False
    """Random weights in the architecture of `pretrained` instead of its trained ones."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant): less memory, about a third more time."""
    freeze: list[str] = field(default_factory=list)
    """What does not train: "vision" and "projector" for these parts, however the model's family calls them, and other
    text as a regular expression that is searched in parameter names (e.g. "layers.0.")."""
    lora: LoRAConfig | None = None
    """Train adapters (float32, whatever `dtype`) instead of the weights themselves."""
    quantization: QuantizationConfig | None = None
    """Hold the language model's linear layers in 4 bits under the adapters (QLoRA); needs `lora` and bitsandbytes."""

    def __post_init__(self) -> None:
        """Accept the plain dicts that a checkpoint keeps of `lora` and `quantization`."""
        if isinstance(self.lora, dict):
            self.lora = LoRAConfig(**self.lora)
        if isinstance(self.quantization, dict):
            self.quantization = QuantizationConfig(**self.quantization)
        if self.quantization and not self.lora:
            raise ValueError(
                "vlm.quantization is set and vlm.lora is not, expected both, since 4-bit weights cannot train; add "
                "--config configs/qlora.yaml or --model.init_args.vlm.lora.r 16, or leave vlm.quantization out."
            )


def load_model(config: VLMConfig | str = "demo", *, on_meta: bool = False) -> PreTrainedModel | PeftModel:
    """Load a Hugging Face vision-language model in evaluation mode.

    Args:
        config: A name or folder with every default, or a full configuration.
        on_meta: Build it without weights, on the meta device: for those who fill it otherwise, or only ask its shape.

    Raises:
        FileNotFoundError: `pretrained` is a path without a model.
        ImportError: `quantization` without bitsandbytes.
        ValueError: An attention kernel that the model or the machine has not, weights that do not fit the
            architecture, a `freeze` pattern that matches no parameter, LoRA targets that match no layer, or a
            `quantization` that leaves nothing in 4 bits.
    """
    config = VLMConfig(config) if isinstance(config, str) else config
    plan = _plan(config)
    try:
        model, info = _load(config, plan, on_meta=on_meta)
    except (ImportError, ValueError) as error:
        if config.attn_implementation not in str(error) and "attention" not in str(error).lower():
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"attn_implementation {config.attn_implementation!r} cannot be used with {config.pretrained!r}: {reason}; "
            "install what it asks for, or choose sdpa or eager."
        ) from error
    if info:
        bad = {
            kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
        }
        if bad:
            raise ValueError(
                f"The weights in {config.pretrained!r} do not fit {type(model).__name__} ({bad}), expected every key "
                "to load; give a checkpoint of this very architecture."
            )
    adapt(model)
    if plan:
        keep_layout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for pattern in config.freeze:
        _freeze(model, pattern)
    return _add_lora(model, config.lora, on_meta=on_meta) if config.lora else model


def _plan(config: VLMConfig) -> BitsAndBytesConfig | None:
    if config.quantization is None:
        return None
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(resolve_pretrained(config.pretrained))
        )
    return quantization_plan(skeleton, config.quantization, getattr(torch, config.dtype))


def _load(
    config: VLMConfig, plan: BitsAndBytesConfig | None, *, on_meta: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says about the keys that it loaded."""
    source: Any = AutoModelForImageTextToText
    path = resolve_pretrained(config.pretrained)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    if config.from_scratch or on_meta:
        with torch.device("meta") if on_meta else nullcontext():
            model = source.from_config(AutoConfig.from_pretrained(path), **options).eval()
        if on_meta or plan is None:
            return (quantize_skeleton(model, plan) if plan else model), {}
        source = type(model)
        options |= {"config": model.config, "state_dict": model.state_dict()}
    if plan:
        # Quantised one by one where they will be used: Lightning makes its device the default while a model is built.
        options |= {"quantization_config": plan, "device_map": {"": torch.get_default_device()}}
    folder = None if config.from_scratch else path
    loaded: tuple[PreTrainedModel, dict[str, Any]] = source.from_pretrained(folder, output_loading_info=True, **options)
    return loaded


def end_ids(model: Any, processor: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in [*listed, tokenizer_of(processor).eos_token_id] if token is not None})


def up_to_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """True on a generation up to its first end token, that one included, false on padding behind it, (B, T)."""
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).long()
    return is_end.cumsum(1) - is_end == 0


def _freeze(model: PreTrainedModel, pattern: str) -> None:
    part = next((part for part in PARTS if part == pattern), None)
    searched = part_pattern(family_of(model), part) if part else pattern
    frozen = [parameter for name, parameter in model.named_parameters() if re.search(searched, name)]
    if not frozen:
        raise ValueError(
            f"freeze pattern {pattern!r} matches no parameter of {type(model).__name__}, expected {' or '.join(PARTS)} "
            f"or a regular expression found in names like {next(iter(model.state_dict()))!r}; correct or remove it."
        )
    for parameter in frozen:
        parameter.requires_grad_(False)


def _add_lora(model: PreTrainedModel, lora: LoRAConfig, *, on_meta: bool) -> PeftModel:
    exclude = lora.exclude or f".*{part_pattern(family_of(model), 'vision', 'projector')}.*"
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=exclude,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft_config, low_cpu_mem_usage=on_meta).eval()
    except ValueError as error:
        raise ValueError(
            f"LoRA found no layer to adapt in {type(model).__name__} (targets {lora.targets}, exclude "
            f"{exclude!r}): {error}"
        ) from error
