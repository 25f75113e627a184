"""A model's weights where several processes share them (FSDP2): shared, whole again for a while, and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from avar_lightning.attention import find_vlm
from avar_lightning.checkpoints import plain_name, replaced
from avar_lightning.families import sharding_units


def shard(
    model: PreTrainedModel | PeftModel, mesh: DeviceMesh, *, dtype: torch.dtype | None = None, offload: bool = False
) -> None:
    """Share the weights among processes with FSDP2, each decoder layer and vision block a unit, in place.

    Args:
        model: On the meta device, or on any other, and the weights move to the mesh's.
        mesh: One dimension, the processes that share the weights.
        dtype: Of gathered weights and of the computation; gradients are summed in float32. The weights' own when unset.
        offload: Keep each process's part in host memory.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    units = sharding_units(find_vlm(model))
    for module in [module for module in model.modules() if type(module).__name__ in units]:
        fully_shard(module, **options)
    fully_shard(model, **options)


def load_sharded(
    load: Callable[..., PreTrainedModel | PeftModel],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a model whose weights processes share; a collective call.

    The first process reads the weights, into host memory; the others get their parts from it, one tensor after the
    other. So there is one copy in all the machines together, and on a device never more than its part and one tensor.

    Args:
        load: Loads the model, whole; with `on_meta=True` the same one without weights.
        mesh: One dimension, the processes that share the weights.
        dtype: As in `shard`.
        offload: As in `shard`.
    """
    source = load() if dist.get_rank() == 0 else None
    model = load(on_meta=True)
    shard(model, mesh, dtype=dtype, offload=offload)
    device = _device(mesh.device_type)
    model.to_empty(device="cpu" if offload else device)
    find_vlm(model).tie_weights()  # new parameters are no longer those of two modules
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload, strict=True)
    set_model_state_dict(model, source.state_dict() if source is not None else {}, options=options)
    _share_buffers(model, source, device)
    if source is not None:
        # How names in files become names in the model, which saving turns back.
        conversions: Any = getattr(find_vlm(source), "_weight_conversions", None)
        find_vlm(model)._weight_conversions = conversions
    _share_settings(model, source)
    return model.eval()


def load_for_fsdp1(
    load: Callable[..., PreTrainedModel | PeftModel], strategy: FSDPStrategy
) -> PreTrainedModel | PeftModel:
    """Load a model that FSDP1 is about to wrap: whole in the first process, which then gives the others their parts.

    Where two modules have the same weights (tied embeddings), every process reads them: FSDP1 cannot tie them again.

    Args:
        load: As in `load_sharded`.
        strategy: Gets the options that this needs. Where it leaves precision to the trainer, gradients are summed in
            float32 and buffers keep it: rotary frequencies in bfloat16 turn far tokens by whole radians.
    """
    if strategy.mixed_precision is None:
        precision: Any = strategy.precision_plugin
        exact = {"reduce_dtype": torch.float32, "buffer_dtype": torch.float32}
        strategy.mixed_precision = replace(precision.mixed_precision_config, **exact)
    blank = load(on_meta=True)
    if len(list(blank.named_parameters())) < len(list(blank.named_parameters(remove_duplicate=False))):
        return load()
    strategy.kwargs |= {"sync_module_states": True, "param_init_fn": _materialise}
    source = load() if dist.get_rank() == 0 else None
    model = blank if source is None else source
    _share_settings(model, source)
    return model


def _materialise(module: nn.Module) -> None:
    if any(tensor.is_meta for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
        module.to_empty(device=_device("cuda" if torch.cuda.is_available() else "cpu"), recurse=False)


def _device(kind: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _share_settings(model: nn.Module, source: nn.Module | None) -> None:
    """Give what a checkpoint says of generation to processes that built the model from its configuration alone."""
    settings: list[Any] = [None if source is None else find_vlm(source).generation_config]
    dist.broadcast_object_list(settings, src=0)
    find_vlm(model).generation_config = settings[0]


def _share_buffers(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Fill buffers from those of the first process; some are in no state dict."""
    theirs = dict(source.named_buffers()) if source is not None else {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            own = torch.empty_like(buffer, device=device)
            if theirs:
                own.copy_(theirs[f"{prefix}.{name}" if prefix else name])
            dist.broadcast(own, src=0)
            module._buffers[name] = own


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights in every process, where FSDP shares them, and sharded again afterwards.

    For generation: it calls parts of a model outside of its forward, and would otherwise gather every layer for every
    token. Memory must hold the weights once. A collective call at both ends; in between processes are independent, and
    nothing is learned. Under FSDP1, inside of a step alone, where its outermost unit has its weights.
    """
    units = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    with _gathered_by_fsdp1(units) if units else _gathered_by_fsdp2(model):
        yield


@contextmanager
def _gathered_by_fsdp1(units: list[FullyShardedDataParallel]) -> Iterator[None]:
    with ExitStack() as stack:
        for unit in units:
            stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False))
            unit.__dict__["forward"] = unit.module.__call__  # its own would gather again
            stack.callback(unit.__dict__.pop, "forward")
        yield


@contextmanager
def _gathered_by_fsdp2(model: nn.Module) -> Iterator[None]:
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


def clip_gradients(parameters: Iterable[nn.Parameter], root: nn.Module | None, limit: float) -> float:
    """Scale the gradients of all processes to a global norm of at most `limit`; gives the norm before.

    Args:
        parameters: That train.
        root: What the strategy has made of the module; under FSDP1 it alone knows the norm.
        limit: At most this; infinite to measure alone.
    """
    if isinstance(root, FullyShardedDataParallel):
        return float(root.clip_grad_norm_(limit))
    norm = clip_grad_norm_(list(parameters), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """What `save_pretrained` must be given beside the folder: gathered weights, where FSDP2 shares them.

    Adapters only, with PEFT. A collective call; only the first process gets the weights.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return {}
    adapters_only = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters_only)
    return {"state_dict": _tied(model, get_model_state_dict(model, options=options))}


def _tied(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The same with one tensor for all names of one parameter, which `save_pretrained` then writes once."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(name)
        if name in state:
            state[name] = state[first.setdefault(id(parameter), name)]
    return state


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Write a model's weights (with PEFT: its adapters) in Hugging Face format, gathered where they are sharded.

    The first process writes; the folder is whole or not there. A collective call, where there are several.
    """
    options = whole_state(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    with replaced(folder, "free space, or choose another folder.") as unfinished:
        save: Any = model.save_pretrained
        save(unfinished, **options)
