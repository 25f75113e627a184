"""Answers and attention of one batch of prompts under one setting."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from avar_lightning.attention import LayerSpec, find_vlm, observe_attention, steer_attention
from avar_lightning.data.collate import Collator, is_sequence
from avar_lightning.decoding import greedy
from avar_lightning.interventions.settings import Setting
from avar_lightning.model import end_ids, up_to_end
from avar_lightning.processing import tokenizer_of
from avar_lightning.rewards import accuracy_reward, extract_answer
from avar_lightning.roles import Role
from avar_lightning.sharding import gathered
from avar_lightning.vas import visual_attention_score

Reward = Callable[..., Sequence[float | None]]
METRICS = ("accuracy", "vas", "vas_ratio_of_means", "vas_response", "vas_ratio_of_means_response")
"""What is known of each answer: its reward, and VAS of the prompt's user tokens and of the answer's own tokens."""

# Arguments of a model's forward that belong to training, or that `generate` makes itself.
_NOT_FOR_GENERATE = {"self", "labels", "position_ids", "inputs_embeds", "past_key_values", "use_cache", "kwargs"}


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
    sequences = {name for name, value in inputs.items() if is_sequence(value, input_ids)} | {"attention_mask"}
    others = {name: value for name, value in inputs.items() if name not in sequences}
    own = batch.get("prompt")
    if isinstance(own, Mapping) and isinstance(own.get("input_ids"), Tensor):
        if "role_ids" not in own:
            raise ValueError("batch['prompt'] has no 'role_ids', expected one role for each of its tokens; add them.")
        return others | {name: value for name, value in own.items() if name in taken or name == "role_ids"}
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    whole = {name: inputs[name] for name in sequences if name in inputs} | {
        "attention_mask": mask,
        "role_ids": role_ids,
    }
    rows = []
    for index, (roles, kept) in enumerate(zip(role_ids, mask.bool(), strict=True)):
        positions = _last_turn(roles, kept)
        rows.append({name: value[index : index + 1, positions] for name, value in whole.items()})
    return others | Collator(pad_token_id).merge(rows, "left")


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
    repetition_penalty: float = 1.0,
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
        repetition_penalty: Of `decoding.greedy`.

    Returns:
        One row a sample: `id`, `completion`, `finished` (whether it ended by itself, and was not cut), `num_tokens` of
        the answer, its end included, and `METRICS`, NaN where undefined.
    """
    role_ids = prompt["role_ids"]
    vlm = find_vlm(model)
    tokenizer = tokenizer_of(processor)
    ends = end_ids(vlm, tokenizer)
    queries = [Role.USER, Role.RESPONSE]
    with gathered(vlm), ExitStack() as contexts:
        record = contexts.enter_context(observe_attention(vlm, role_ids, queries=queries, layers=layers))
        if setting.intervention is not None:
            contexts.enter_context(steer_attention(vlm, role_ids, **vars(setting.intervention)))
        generate: Any = vlm.generate
        tokens = generate(
            **{name: value for name, value in prompt.items() if name != "role_ids"},
            **greedy(vlm, processor, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty),
        )
    new = tokens[:, role_ids.shape[1] :]
    completions = tokenizer.batch_decode(new, skip_special_tokens=True)
    rewards = _score(completions, columns, reward)
    image, system = record.mass_of(Role.IMAGE), record.mass_of(Role.SYSTEM)
    # Of the answer, tokens up to its end were rows; the padding behind it is none of the model's doing.
    own = up_to_end(new, ends)
    alive = pad(own, (role_ids.shape[1], 0), value=True)[:, : record.role_ids.shape[1]]
    finished = torch.isin(new, torch.tensor(ends, device=new.device)).any(1).tolist()
    lengths = own.sum(1).tolist()
    masks = {"": record.query_mask(Role.USER), "_response": record.query_mask(Role.RESPONSE) & alive}
    scores = {
        name + suffix: visual_attention_score(image, system, mask.to(image.device), reduction=reduction).tolist()
        for suffix, mask in masks.items()
        for name, reduction in (("vas", "mean_of_ratios"), ("vas_ratio_of_means", "ratio_of_means"))
    }
    return [
        {"id": column.get("id"), "completion": text, "finished": finished[index], "num_tokens": lengths[index]}
        | {"accuracy": value}
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
            rewards[i] = math.nan if value is None else float(value)
    return rewards


def columns_of(batch: Mapping[str, Any], role_ids: Tensor, processor: Any) -> list[dict[str, Any]]:
    """What rewards get of each sample: the batch's `columns`, else its `answer`, else its own last response."""
    size = len(role_ids)
    if isinstance(batch.get("columns"), list):
        return [dict(column) for column in batch["columns"]]
    if batch.get("answer") is not None:
        return [{"answer": value} for value in batch["answer"]]
    tokenizer = tokenizer_of(processor)
    columns: list[dict[str, Any]] = []
    for index in range(size):
        kept = torch.ones_like(role_ids[index], dtype=torch.bool)
        start = len(_last_turn(role_ids[index], kept))
        response = batch["input_ids"][index, start:][role_ids[index, start:] == Role.RESPONSE]
        text = tokenizer.decode(response, skip_special_tokens=True)
        columns.append({"answer": extract_answer(text) or text})
    return columns
