"""The state of an optimizer by the names of parameters, so that another strategy or order of them can take it up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

# What wrappers put into names, which Lightning's and torch's own state dicts leave out too.
WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing, compilation and sharding add to it.

    >>> plain_name("model.layers.0._checkpoint_wrapped_module.mlp.weight")
    'model.layers.0.mlp.weight'
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of an optimizer's parameters, in its order."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def by_name(state: dict[str, Any], groups: Sequence[Iterable[str]]) -> dict[str, Any]:
    """An optimizer's state dict with names for its numbers, as sharding strategies keep it."""
    names = [name for group in groups for name in group]
    return {
        **state,
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": list(names)} for group, names in zip(state["param_groups"], groups, strict=True)
        ],
    }


def by_number(state: dict[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The inverse of :func:`by_name`, whatever order the names have in the state.

    Raises:
        ValueError: The state has other groups.
    """
    theirs = [set(group["params"]) for group in state["param_groups"]]
    if theirs != [set(group) for group in groups]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {[len(group) for group in theirs]} parameters, expected the "
            f"{[len(group) for group in groups]} that train now; restore vlm.freeze and vlm.lora, or start anew from "
            "the exported model (avar export)"
        )
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    numbered = [
        {**group, "params": [numbers[name] for name in names]} for group, names in zip(state["param_groups"], groups)
    ]
    return {
        **state,
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": numbered,
    }


def is_by_name(state: dict[str, Any]) -> bool:
    """Whether a state dict has names for parameters."""
    return any(isinstance(name, str) for group in state.get("param_groups", ()) for name in group["params"])


def trained_names(state: dict[str, Any]) -> list[str]:
    """Names of all parameters in a state dict by name, in its order."""
    return [name for group in state["param_groups"] for name in group["params"]]
