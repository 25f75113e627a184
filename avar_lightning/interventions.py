"""What steering does to a model: answers and attention on the same prompts, unsteered and steered.

A `Setting` is a named intervention; schedules make lists of them (a grid, one layer left out at a time, single heads,
random heads). `answer` runs one batch of prompts under one setting, `compare` puts two sets of answers side by side,
sample by sample, with a bootstrap interval. InterventionCallback and `avar sweep` are built on these.
"""

from __future__ import annotations

import inspect
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
from torch.distributed.tensor import DTensor
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

# Arguments of a model's forward that belong to training, or that `generate` makes itself.
_NOT_FOR_GENERATE = {"self", "labels", "position_ids", "inputs_embeds", "past_key_values", "use_cache", "kwargs"}


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
    """The chosen heads, and as many heads drawn at random from the whole decoder, several times: a control.

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


def prompt_of(batch: Mapping[str, Any], role_ids: Tensor, model: nn.Module, pad_token_id: int) -> dict[str, Any]:
    """What to generate from: the batch's own `prompt`, or its sequences up to their last response.

    Args:
        batch: `input_ids`, `attention_mask` and whatever else the model takes, and other things, which are left out;
            perhaps a `prompt`, a mapping with `input_ids` and `role_ids`, padded on the left.
        role_ids: Roles of the batch's tokens (B, N).
        model: A Hugging Face VLM, or a module that holds one; its forward says what it takes.
        pad_token_id: Fills prompts up on the left.

    Returns:
        Arguments for `generate`, sequences padded on the left, and `role_ids`.

    Raises:
        ValueError: The batch's prompt has no roles.
    """
    taken = set(inspect.signature(type(find_vlm(model)).forward).parameters) - _NOT_FOR_GENERATE
    input_ids = batch["input_ids"]
    inputs = {name: value for name, value in batch.items() if name in taken and value is not None}
    sequences = {name for name, value in inputs.items() if _is_sequence(value, input_ids)} | {"attention_mask"}
    others = {name: value for name, value in inputs.items() if name not in sequences}
    own = batch.get("prompt")
    if isinstance(own, Mapping) and isinstance(own.get("input_ids"), Tensor):
        if "role_ids" not in own:
            raise ValueError("batch['prompt'] has no 'role_ids', expected one role for each of its tokens; add them.")
        return others | {name: value for name, value in own.items() if name in taken or name == "role_ids"}
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    ends = [_last_turn(roles, kept) for roles, kept in zip(role_ids, mask.bool(), strict=True)]
    longest = max(len(positions) for positions in ends)
    rows = {name: inputs[name] for name in sequences if name in inputs} | {"attention_mask": mask, "role_ids": role_ids}

    def cut(name: str, value: Tensor) -> Tensor:
        fill = pad_token_id if name == "input_ids" else 0
        margins = [0, 0] * (value.dim() - 2)
        kept = [pad(row[at], [*margins, longest - len(at), 0], value=fill) for row, at in zip(value, ends, strict=True)]
        return torch.stack(kept)

    return others | {name: cut(name, value) for name, value in rows.items()}


def _is_sequence(value: Any, input_ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == input_ids.shape


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
        reward: TRL's signature, `(completions, **columns) -> list[float]`; `accuracy_reward` is asked only for samples
            that have an `answer`.
        layers: Decoder layers in which VAS is measured.

    Returns:
        One row a sample: `id`, `completion` and `METRICS`, NaN where undefined.
    """
    role_ids = prompt["role_ids"]
    vlm = find_vlm(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = _ends(vlm, tokenizer)
    queries = [Role.USER, Role.RESPONSE]
    with ExitStack() as contexts:
        record = contexts.enter_context(observe_attention(vlm, role_ids, queries=queries, layers=layers))
        if setting.intervention is not None:
            contexts.enter_context(steer_attention(vlm, role_ids, **vars(setting.intervention)))
        generate: Any = vlm.generate
        tokens = generate(
            **{name: value for name, value in prompt.items() if name != "role_ids"},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=_placeholders(vlm),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=ends,
            # Processes whose answers end at different lengths must still run sharded layers together.
            synced_gpus=any(isinstance(parameter, DTensor) for parameter in vlm.parameters()),
        )
    new = tokens[:, role_ids.shape[1] :]
    completions = tokenizer.batch_decode(new, skip_special_tokens=True)
    rewards = _score(completions, columns, reward)
    image, system = record.mass_of(Role.IMAGE), record.mass_of(Role.SYSTEM)
    # Of the answer, tokens up to its end were rows; the padding behind it is none of the model's doing.
    is_end = torch.isin(new, torch.tensor(ends, device=new.device)).long()
    after_end = is_end.cumsum(1) - is_end > 0
    alive = pad(~after_end, (role_ids.shape[1], 0), value=True)[:, : record.role_ids.shape[1]]
    masks = {"": record.query_mask(Role.USER), "_response": record.query_mask(Role.RESPONSE) & alive}
    scores = {
        name + suffix: visual_attention_score(image, system, mask.to(image.device), reduction=reduction).tolist()
        for suffix, mask in masks.items()
        for name, reduction in (("vas", "mean_of_ratios"), ("vas_ratio_of_means", "ratio_of_means"))
    }
    return [
        {"id": column.get("id"), "completion": text, "accuracy": value}
        | {name: values[index] for name, values in scores.items()}
        for index, (column, text, value) in enumerate(zip(columns, completions, rewards, strict=True))
    ]


def _score(completions: list[str], columns: Sequence[Mapping[str, Any]], reward: Reward) -> list[float]:
    """Rewards, NaN for samples without the answer that `accuracy_reward` compares with."""
    needs_answer = reward is accuracy_reward
    scored = [i for i, column in enumerate(columns) if not needs_answer or column.get("answer") not in (None, "")]
    names = dict.fromkeys(name for column in columns for name in column)
    rewards = [math.nan] * len(completions)
    if scored:
        given = {name: [columns[i].get(name) for i in scored] for name in names}
        for i, value in zip(scored, reward([completions[i] for i in scored], **given), strict=True):
            rewards[i] = float(value)
    return rewards


def _ends(vlm: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's own generation settings."""
    own = vlm.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


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


def _placeholders(vlm: Any) -> list[int] | None:
    """Tokens that stand for pictures: sampled without one behind them, they break the next forward."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = {getattr(vlm.config, name, None) for name in names}
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
