"""What is steered: named settings, and schedules that make lists of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from avar_lightning.attention import Intervention, select_layers


@dataclass(frozen=True)
class Setting:
    """One way to run the model: a name, and what is steered (None for nothing)."""

    name: str
    intervention: Intervention | None


UNSTEERED = Setting("unsteered", None)


def grid(images: Sequence[float], systems: Sequence[float], modes: Sequence[str], **where: Any) -> list[Setting]:
    """Every combination of strengths and modes that changes anything.

    Args:
        images: Strengths on image tokens.
        systems: Strengths on system tokens.
        modes: Of `attention.MODES`.
        **where: `queries`, `layers` or `heads` of each `Intervention`.

    Raises:
        ValueError: A strength makes a weight negative, a mode is unknown, or two settings are the same.

    >>> [setting.name for setting in grid([0.0, 0.3], [0.4], ["logit"])]
    ['logit image=0 system=0.4', 'logit image=0.3 system=0.4']
    """
    settings = []
    for mode in modes:
        for image in images:
            for system in systems:
                intervention = Intervention(image, system, mode, **where)  # type: ignore[arg-type]
                if intervention.active:
                    settings.append(Setting(f"{mode} image={image:g} system={system:g}", intervention))
    names = [setting.name for setting in settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]} is in the grid more than once, expected different strengths and modes.")
    return settings


def leave_one_layer_out(intervention: Intervention, layers: Sequence[int]) -> list[Setting]:
    """The whole intervention, and once without each of its layers: what a layer contributes.

    Args:
        intervention: On layers, not on heads.
        layers: Those that can be steered (`attention_layers`).

    Raises:
        ValueError: The intervention has a single layer, or names heads.
    """
    if intervention.heads is not None:
        raise ValueError("leaving out layers needs an intervention on layers; leave heads unset.")
    chosen = select_layers(intervention.layers, max(layers) + 1) or tuple(layers)
    if len(chosen) < 2:
        raise ValueError(f"layers is {list(chosen)}, expected two or more to leave one out.")
    rest = {left_out: tuple(layer for layer in chosen if layer != left_out) for left_out in chosen}
    return [
        Setting("all layers", replace(intervention, layers=chosen)),
        *(Setting(f"without layer {layer}", replace(intervention, layers=rest[layer])) for layer in chosen),
    ]


def one_head_each(intervention: Intervention, layers: Sequence[int], num_heads: int) -> list[Setting]:
    """Each head of the intervention's layers, or each of its heads, steered alone.

    Args:
        intervention: On layers or on heads.
        layers: Those that can be steered (`attention_layers`).
        num_heads: Query heads of a layer.
    """
    heads: Mapping[int, Sequence[int]] | None = intervention.heads
    if heads is None:
        chosen = select_layers(intervention.layers, max(layers) + 1) or tuple(layers)
        heads = {layer: range(num_heads) for layer in chosen}
    return [
        Setting(f"layer {layer} head {head}", replace(intervention, layers=None, heads={layer: (head,)}))
        for layer in sorted(heads)
        for head in heads[layer]
    ]


def random_heads(
    intervention: Intervention, layers: Sequence[int], num_heads: int, *, repeats: int, seed: int = 0
) -> list[Setting]:
    """The chosen heads, and as many heads drawn at random from the others, several times: a control.

    Where more than half of the heads are chosen, the draws are from all of them.

    Args:
        intervention: On heads.
        layers: Those that can be steered (`attention_layers`).
        num_heads: Query heads of a layer.
        repeats: Number of draws.
        seed: Of the draws.

    Raises:
        ValueError: The intervention names no heads.
    """
    if intervention.heads is None:
        raise ValueError("random heads are a control for chosen ones; name those with heads={layer: [head, ...]}.")
    everything = [(layer, head) for layer in layers for head in range(num_heads)]
    chosen = {(layer, head) for layer, heads in intervention.heads.items() for head in heads}
    others = [place for place in everything if place not in chosen]
    count = len(chosen)
    pool = others if len(others) >= count else everything
    settings = [Setting("chosen heads", intervention)]
    rng = random.Random(seed)
    for number in range(repeats):
        heads: dict[int, list[int]] = {}
        for layer, head in sorted(rng.sample(pool, count)):
            heads.setdefault(layer, []).append(head)
        settings.append(Setting(f"random heads {number}", replace(intervention, heads=heads)))
    return settings
