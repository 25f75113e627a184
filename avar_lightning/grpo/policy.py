"""Log-probabilities of completions: prompts on the left, completions on the right, one forward for both.

Shape letters: B completions, P tokens of the longest prompt, T of the longest completion, V words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from avar_lightning.data.collate import Collator, is_sequence
from avar_lightning.roles import Role
from avar_lightning.scoring import ScoringConfig, score_tokens


@dataclass
class CompletionBatch:
    """Prompts with their completions, ready for the model.

    Attributes:
        inputs: Arguments of the model's forward, sequences (B, P + T): prompts padded on the left, completions on the
            right.
        role_ids: (B, P + T); completions are responses.
        completion_ids: (B, T).
        completion_mask: Tokens of the completions, bool (B, T).
    """

    inputs: dict[str, Tensor]
    role_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor


def completion_batch(
    rows: Sequence[Mapping[str, Tensor]], token_ids: Sequence[Tensor], *, pad_token_id: int, device: torch.device | str
) -> CompletionBatch:
    """Join prompts, each with its own pictures, and completions.

    Args:
        rows: Prompts as `Encoded.prompt_row` has them, one a completion.
        token_ids: Completions, int64 (T,), perhaps empty.
        pad_token_id: Fills both sides up.
        device: Where the batch goes.
    """
    prompts = {name: value.to(device) for name, value in Collator(pad_token_id).merge(rows, "left").items()}
    ids = [tokens.to(device) for tokens in token_ids]
    completion_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    if not completion_ids.shape[1]:  # every completion is empty: one padded position keeps shapes as they are
        completion_ids = completion_ids.new_full((len(ids), 1), pad_token_id)
    lengths = torch.tensor([len(tokens) for tokens in ids], device=device)
    mask = torch.arange(completion_ids.shape[1], device=device) < lengths[:, None]
    new = {
        "input_ids": completion_ids,
        "attention_mask": mask.to(prompts["attention_mask"].dtype),
        "role_ids": torch.where(mask, int(Role.RESPONSE), int(Role.OTHER)),
    }
    joined = {}
    for name, value in prompts.items():
        if not is_sequence(value, prompts["input_ids"]):
            joined[name] = value
        elif name in new:
            joined[name] = torch.cat([value, new[name]], dim=1)
        elif value.ndim == 2:  # token types: text
            joined[name] = pad(value, (0, completion_ids.shape[1]))
        else:  # what a text token may see of the pictures (Llama-3.2-Vision): as much as the prompt's last token
            joined[name] = torch.cat([value, value[:, -1:].expand(-1, completion_ids.shape[1], *value.shape[2:])], 1)
    return CompletionBatch(joined, joined.pop("role_ids"), completion_ids, mask)


def completion_logps(
    model: nn.Module,
    batch: CompletionBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    scoring: ScoringConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token of the completions, under the policy at the sampling temperature.

    Args:
        model: A Hugging Face VLM, perhaps with adapters.
        batch: Of `completion_batch`.
        temperature: Divides the logits.
        with_entropy: Also give the entropy of each position, without a gradient.
        scoring: How it is computed.

    Returns:
        Log-probabilities (B, T), float32, with a gradient where the forward has one, 0 where the mask is
        false; entropies (B, T) in nats, or None.
    """
    return score_tokens(
        model,
        batch.inputs,
        batch.completion_ids,
        batch.completion_mask,
        config=scoring,
        temperature=temperature,
        with_entropy=with_entropy,
    )
