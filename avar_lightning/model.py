"""Load a vision-language model the way a training run needs it: attention kernel, adapters, frozen parts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from avar_lightning.attention import find_vlm
from avar_lightning.processing import resolve_pretrained, tokenizer_of


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
    exclude: str = r".*(visual|vision).*"
    """Regular expression of module names that never get one; the default spares the vision tower."""


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
    """Regular expressions, searched in parameter names, of parameters that do not train (e.g. "visual")."""
    lora: LoRAConfig | None = None
    """Train adapters instead of the weights themselves."""

    def __post_init__(self) -> None:
        """Accept the plain dict that a checkpoint keeps of `lora`."""
        if isinstance(self.lora, dict):
            self.lora = LoRAConfig(**self.lora)


def load_model(config: VLMConfig | str = "demo") -> PreTrainedModel | PeftModel:
    """Load a Hugging Face vision-language model in evaluation mode.

    Args:
        config: A name or folder with every default, or a full configuration.

    Raises:
        FileNotFoundError: `pretrained` is a path without a model.
        ValueError: An attention kernel that the model or the machine has not, weights that do not fit the
            architecture, a `freeze` pattern that matches no parameter, or LoRA
            targets that match no layer.
    """
    config = VLMConfig(config) if isinstance(config, str) else config
    path = resolve_pretrained(config.pretrained)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    info: dict[str, Any] = {}
    try:
        if config.from_scratch:
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path), **options).eval()
        else:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True, **options)
            model, info = loaded
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
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for pattern in config.freeze:
        _freeze(model, pattern)
    return _add_lora(model, config.lora) if config.lora else model


def shard(model: PreTrainedModel | PeftModel, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> None:
    """Shard the weights over processes with FSDP2, each layer a unit, in place.

    Args:
        model: On any device; its weights move to the mesh's.
        mesh: One dimension, the processes that share the weights.
        dtype: Of gathered weights and of the computation; gradients are summed in float32. The weights' own when unset.
    """
    units = set(find_vlm(model)._no_split_modules or ())
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    for module in [module for module in model.modules() if type(module).__name__ in units]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights in every process, where FSDP2 shares them, and sharded again afterwards.

    For generation: it calls parts of a model outside of its forward, and would otherwise gather every layer for every
    token. Memory must hold the weights once. A collective call at both ends; in between processes are independent.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for root in units[:1]:
        # Generation may call a layer before the root, which would then take itself for one. FSDP2 has no public name
        # for this, which the root's first forward does.
        fully_shard.state(root)._lazy_init()  # type: ignore[attr-defined]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # The root's weights are needed again at once, in backward; FSDP2 keeps them after a forward by default.
            unit.set_reshard_after_forward(unit is not units[0], recurse=False)
            unit.reshard()


def whole_state(model: nn.Module) -> dict[str, Any]:
    """What `save_pretrained` must be given beside the folder: gathered weights, where FSDP2 shares them.

    Adapters only, with PEFT. A collective call; only the first process gets the weights.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return {}
    adapters_only = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters_only)
    return {"state_dict": get_model_state_dict(model, options=options)}


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Write a model's weights (with PEFT: its adapters) in Hugging Face format, gathered where they are sharded.

    The first process writes; the folder is whole or not there. A collective call, where there are several.
    """
    folder = Path(folder)
    options = whole_state(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    save: Any = model.save_pretrained
    save(unfinished, **options)
    unfinished.rename(folder)


def placeholder_ids(config: Any) -> list[int] | None:
    """Tokens that stand for pictures: sampled without one behind them, they break the next forward."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = {getattr(config, name, None) for name in names}
    return sorted(token for token in found if isinstance(token, int)) or None


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
    frozen = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
    if not frozen:
        raise ValueError(
            f"freeze pattern {pattern!r} matches no parameter of {type(model).__name__}, expected a regular expression "
            f"found in names like {next(iter(model.state_dict()))!r}; correct or remove it."
        )
    for parameter in frozen:
        parameter.requires_grad_(False)


def _add_lora(model: PreTrainedModel, lora: LoRAConfig) -> PeftModel:
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=lora.exclude,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(
            f"LoRA found no layer to adapt in {type(model).__name__} (targets {lora.targets}, exclude "
            f"{lora.exclude!r}): {error}"
        ) from error
