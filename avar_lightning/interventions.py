"""What steering does to a model: answers and attention on the same prompts, unsteered and steered.

A `Setting` is a named intervention; schedules make lists of them (a grid, one layer left out at a time, single heads,
random heads). `answer` runs one batch of prompts under one setting, `compare` puts two sets of answers side by side,
sample by sample, with a bootstrap interval. InterventionCallback and `avar sweep` are built on these.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from avar_lightning.attention import (
    Intervention,
    LayerSpec,
    find_vlm,
    observe_attention,
    select_layers,
    steer_attention,
)
from avar_lightning.rewards import accuracy_reward, extract_answer
from avar_lightning.roles import Role
from avar_lightning.vas import visual_attention_score

Reward = Callable[..., list[float]]
METRICS = ("accuracy", "vas", "vas_ratio_of_means", "vas_response", "vas_ratio_of_means_response")
"""What is known of each answer: its reward, and VAS of the prompt's user tokens and of the answer's own tokens."""

_NOT_FOR_GENERATE = {"labels", "role_ids", "prompt", "columns", "images"}


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
    return settings


def leave_one_layer_out(intervention: Intervention, num_layers: int) -> list[Setting]:
    """The whole intervention, and once without each of its layers: what a layer contributes.

    Raises:
        ValueError: The intervention has a single layer, or names heads.
    """
    if intervention.heads is not None:
        raise ValueError("leaving out layers needs an intervention on layers; leave heads unset.")
    layers = select_layers(intervention.layers, num_layers) or tuple(range(num_layers))
    if len(layers) < 2:
        raise ValueError(f"layers is {list(layers)}, expected two or more to leave one out.")
    rest = {left_out: tuple(layer for layer in layers if layer != left_out) for left_out in layers}
    return [
        Setting("all layers", replace(intervention, layers=layers)),
        *(Setting(f"without layer {layer}", replace(intervention, layers=rest[layer])) for layer in layers),
    ]


def one_head_each(intervention: Intervention, num_layers: int, num_heads: int) -> list[Setting]:
    """Each head of the intervention's layers steered alone."""
    layers = select_layers(intervention.layers, num_layers) or tuple(range(num_layers))
    return [
        Setting(f"layer {layer} head {head}", replace(intervention, layers=None, heads={layer: (head,)}))
        for layer in layers
        for head in range(num_heads)
    ]


def random_heads(
    intervention: Intervention, num_layers: int, num_heads: int, *, repeats: int, seed: int = 0
) -> list[Setting]:
    """The chosen heads, and as many heads drawn at random from the whole decoder, several times: a control.

    Raises:
        ValueError: The intervention names no heads.
    """
    if intervention.heads is None:
        raise ValueError("random heads are a control for chosen ones; name those with heads={layer: [head, ...]}.")
    everything = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    count = sum(len(set(heads)) for heads in intervention.heads.values())
    settings = [Setting("chosen heads", intervention)]
    rng = random.Random(seed)
    for number in range(repeats):
        heads: dict[int, list[int]] = {}
        for layer, head in sorted(rng.sample(everything, count)):
            heads.setdefault(layer, []).append(head)
        settings.append(Setting(f"random heads {number}", replace(intervention, heads=heads)))
    return settings


# Running


def prompt_of(batch: Mapping[str, Any], role_ids: Tensor, pad_token_id: int) -> dict[str, Any]:
    """What to generate from: the batch's own `prompt`, or its sequences up to their last response.

    Args:
        batch: `input_ids`, `attention_mask` and whatever else the model takes; perhaps a `prompt`.
        role_ids: Roles of the batch's tokens (B, N).
        pad_token_id: Fills prompts up on the left.

    Returns:
        Arguments for the model's forward, sequences padded on the left, and `role_ids`.
    """
    input_ids = batch["input_ids"]
    others = {
        name: value
        for name, value in batch.items()
        if name not in _NOT_FOR_GENERATE and not (isinstance(value, Tensor) and value.shape[:2] == input_ids.shape)
    }
    if "prompt" in batch:
        return others | dict(batch["prompt"])
    sequences = {
        name: value
        for name, value in batch.items()
        if name not in _NOT_FOR_GENERATE and isinstance(value, Tensor) and value.shape[:2] == input_ids.shape
    }
    mask = batch.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    sequences |= {"attention_mask": mask, "role_ids": role_ids}
    ends = [_last_turn(roles, kept) for roles, kept in zip(role_ids, mask.bool(), strict=True)]
    longest = max(len(positions) for positions in ends)
    fills = {"input_ids": pad_token_id}
    return others | {
        name: torch.stack(
            [
                pad(row[at], (longest - len(at), 0), value=fills.get(name, 0))
                for row, at in zip(value, ends, strict=True)
            ]
        )
        for name, value in sequences.items()
    }


def _last_turn(roles: Tensor, kept: Tensor) -> Tensor:
    """Positions of the tokens before the last run of response tokens; all tokens where there is none."""
    positions = kept.nonzero().flatten()
    response = (roles[positions] == Role.RESPONSE).nonzero().flatten()
    if not len(response):
        return positions
    start = int(response[-1])
    while start > 0 and roles[positions[start - 1]] == Role.RESPONSE:
        start -= 1
    return positions[:start]


@torch.no_grad()
def answer(
    model: nn.Module,
    prompt: Mapping[str, Any],
    setting: Setting,
    *,
    processor: Any,
    max_new_tokens: int,
    columns: Sequence[Mapping[str, Any]],
    reward: Reward = accuracy_reward,
    layers: LayerSpec | None = None,
) -> list[dict[str, Any]]:
    """Generate greedily under a setting, and score what comes.

    Args:
        model: A Hugging Face VLM, or a module that holds one.
        prompt: Of `prompt_of`.
        setting: What is steered.
        processor: Processor or tokenizer, to decode.
        max_new_tokens: Longest answer.
        columns: One mapping a sample, handed to `reward` column by column.
        reward: TRL's signature, `(completions, **columns) -> list[float]`.
        layers: Decoder layers in which VAS is measured.

    Returns:
        One row a sample: `id`, `completion` and `METRICS`, NaN where undefined.
    """
    role_ids = prompt["role_ids"]
    tokenizer = getattr(processor, "tokenizer", processor)
    queries = [Role.USER, Role.RESPONSE]
    with ExitStack() as contexts:
        record = contexts.enter_context(observe_attention(model, role_ids, queries=queries, layers=layers))
        if setting.intervention is not None:
            contexts.enter_context(steer_attention(model, role_ids, **vars(setting.intervention)))
        generate: Any = find_vlm(model).generate
        tokens = generate(
            **{name: value for name, value in prompt.items() if name != "role_ids"},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=_placeholders(model),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    new = tokens[:, role_ids.shape[1] :]
    completions = tokenizer.batch_decode(new, skip_special_tokens=True)
    names = dict.fromkeys(name for column in columns for name in column)
    rewards = reward(completions, **{name: [column.get(name) for column in columns] for name in names})
    image, system = record.mass_of(Role.IMAGE), record.mass_of(Role.SYSTEM)
    # Of the answer, tokens up to its end were rows; the padding behind it is none of the model's doing.
    after_end = (new == tokenizer.eos_token_id).long().cumsum(1) - (new == tokenizer.eos_token_id).long() > 0
    alive = pad(~after_end, (role_ids.shape[1], 0), value=True)[:, : record.role_ids.shape[1]]
    masks = {"": record.query_mask(Role.USER), "_response": record.query_mask(Role.RESPONSE) & alive}
    scores = {
        name + suffix: visual_attention_score(image, system, mask.to(image.device), reduction=reduction).tolist()
        for suffix, mask in masks.items()
        for name, reduction in (("vas", "mean_of_ratios"), ("vas_ratio_of_means", "ratio_of_means"))
    }
    return [
        {"id": column.get("id"), "completion": text, "accuracy": float(value)}
        | {name: values[index] for name, values in scores.items()}
        for index, (column, text, value) in enumerate(zip(columns, completions, rewards, strict=True))
    ]


def columns_of(batch: Mapping[str, Any], role_ids: Tensor, processor: Any) -> list[dict[str, Any]]:
    """What rewards get of each sample: the batch's `columns`, else its `answer`, else its own last response."""
    size = len(role_ids)
    if isinstance(batch.get("columns"), list):
        return [dict(column) for column in batch["columns"]]
    if batch.get("answer") is not None:
        return [{"answer": value} for value in batch["answer"]]
    tokenizer = getattr(processor, "tokenizer", processor)
    columns: list[dict[str, Any]] = []
    for index in range(size):
        kept = torch.ones_like(role_ids[index], dtype=torch.bool)
        start = len(_last_turn(role_ids[index], kept))
        response = batch["input_ids"][index, start:][role_ids[index, start:] == Role.RESPONSE]
        text = tokenizer.decode(response, skip_special_tokens=True)
        columns.append({"answer": extract_answer(text) or text})
    return columns


def _placeholders(model: nn.Module) -> list[int] | None:
    """Tokens that stand for pictures: sampled without one behind them, they break the next forward."""
    config = find_vlm(model).config
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = {getattr(config, name, None) for name in names}
    return sorted(token for token in found if isinstance(token, int)) or None


# Comparing


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, with a bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float
    num_pairs: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(before: ArrayLike, after: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0) -> Difference:
    """Mean of `after - before` over samples, and its 95 % percentile bootstrap interval over samples.

    Args:
        before: One value a sample, or (models, samples); pairs in which either is not finite are left out.
        after: The same samples in the same order.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.

    Returns:
        The difference; NaN without pairs. Of several models a sample is drawn with all of them, since they share it.

    >>> paired_difference([0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]).mean
    0.75
    """
    one, two = np.atleast_2d(np.asarray(before, float)), np.atleast_2d(np.asarray(after, float))
    if one.shape != two.shape:
        raise ValueError(f"values have shapes {one.shape} and {two.shape}, expected pairs of the same samples.")
    change = two - one
    finite = np.isfinite(change)
    total, count = np.where(finite, change, 0.0).sum(0), finite.sum(0)
    total, count = total[count > 0], count[count > 0]
    if not len(count):
        return Difference(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(seed)
    means = []
    for chunk in np.array_split(np.arange(num_resamples), max(1, num_resamples * len(count) // 2_000_000)):
        drawn = rng.integers(len(count), size=(len(chunk), len(count)))
        means.append(total[drawn].sum(1) / count[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Difference(float(total.sum() / count.sum()), float(low), float(high), int(count.sum()))


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values, NaN without one."""
    finite: NDArray[np.float64] = np.asarray(list(values), float)
    finite = finite[np.isfinite(finite)]
    return float(finite.mean()) if finite.size else math.nan


def compare(
    before: Sequence[Sequence[Mapping[str, Any]]], after: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Rows of `answer` without and with steering, side by side.

    Args:
        before: For each model, one row a sample.
        after: The same models and samples, under another setting.

    Returns:
        For each of `METRICS` the mean of `after` over models and samples, under `<metric>_sd` the standard deviation
        between the models' means (NaN for one model), and under `<metric>_difference` a `Difference`.
    """
    result: dict[str, Any] = {}
    for name in METRICS:
        one, two = ([[row[name] for row in rows] for rows in models] for models in (before, after))
        means = [mean(values) for values in two]
        result[name] = mean(means)
        result[f"{name}_sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
        result[f"{name}_difference"] = paired_difference(one, two)
    return result
