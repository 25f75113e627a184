"""Roles of a batch of which only the token ids are known."""

from collections.abc import Iterable

import torch
from torch import Tensor

from avar_lightning.roles.headers import Header, Ids, TokenFormat, learn_token_format
from avar_lightning.roles.role import Role
from avar_lightning.roles.template import ChatSource, tokenizer_of
from avar_lightning.roles.tokens import image_token_id, num_bos


def tag_roles(input_ids: Tensor, tokenizer: ChatSource, *, attention_mask: Tensor | None = None) -> Tensor:
    """Roles of a batch that brings only token ids, found by the header tokens of its chat template.

    What a model generated after the last assistant header is RESPONSE up to its end-of-turn token. Agrees
    with `message_roles` but for control tokens that a user typed, and for a system message that the template
    puts inside the first user turn (Gemma): that text is USER here.

    Args:
        input_ids: (B, N) integer, padded on either side.
        tokenizer: the tokenizer, or the processor around it.
        attention_mask: (B, N), zero on padding. Without it, runs of `pad_token_id` at both ends are padding.

    Returns:
        (B, N) int64 `Role` values, on the device of `input_ids`.

    Raises:
        ValueError: wrong shapes, or a row without a user turn.
        ChatTemplateError: the template cannot be segmented, or not by its tokens.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, N); add the batch dimension")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(input_ids.shape)}; "
            "pass the mask of the same batch"
        )
    form, image_id = learn_token_format(tokenizer), image_token_id(tokenizer)
    ids = input_ids.cpu()
    real = _off_padding(ids, tokenizer) if attention_mask is None else attention_mask.cpu().bool()
    roles = torch.full_like(ids, Role.OTHER, dtype=torch.long)
    for row in range(len(ids)):
        row_roles = _tag_row(ids[row, real[row]], form, tokenizer)
        if row_roles is None:
            raise ValueError(
                f"row {row} of input_ids has no user turn in the chat format of the tokenizer; pass the "
                "tokenizer that encoded the batch, or put role_ids into it"
            )
        roles[row, real[row]] = row_roles
        if attention_mask is None:
            _close_by_padding(roles[row], ids[row], real[row], form)
    if image_id is not None:
        roles[real & (ids == image_id)] = Role.IMAGE
    return roles.to(input_ids.device)


def _off_padding(ids: Tensor, source: ChatSource) -> Tensor:
    """(B, N) bool, True off the runs of the padding token at both ends of a row."""
    pad = tokenizer_of(source).pad_token_id
    content = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
    return (content.cumsum(1) > 0) & (content.flip(1).cumsum(1).flip(1) > 0)


def _close_by_padding(roles: Tensor, ids: Tensor, real: Tensor, form: TokenFormat) -> None:
    """Give an unfinished response its end, where the token that ends turns serves as padding too."""
    last = int(real.nonzero().max())
    unfinished = roles[last] == Role.RESPONSE and not any(_ends_with(ids[: last + 1], end) for end in form.ends)
    if unfinished and last + 1 < len(ids) and (int(ids[last + 1]),) in form.ends:
        roles[last + 1] = Role.RESPONSE


def _tag_row(ids: Tensor, form: TokenFormat, source: ChatSource) -> Tensor | None:
    """Roles of one row without padding, images still USER; None if it has no user turn."""
    roles = torch.full_like(ids, Role.OTHER, dtype=torch.long)
    opening = min(_find_headers(ids, form.first), default=None, key=_by_start_then_length)
    if opening is None:
        return None
    start, header = opening
    skipped = num_bos(ids[:start].tolist(), source)
    roles[skipped:start] = Role.SYSTEM

    headers = [(start, header)]  # where each turn's header begins
    for position, later in sorted(_find_headers(ids, form.later), key=_by_start_then_length):
        previous, taken = headers[-1]
        if position >= previous + len(taken.ids):  # not a shorter variant, or a part, of the one before
            headers.append((position, later))

    stops = [position for position, _ in headers[1:]] + [len(ids)]
    bodies = [position + len(header.ids) for position, header in headers]
    for (_, header), body, stop, next_body in zip(headers, bodies, stops, [*bodies[1:], len(ids)], strict=True):
        endings = [body + at + len(end) for end in form.ends for at in _find(ids[body:next_body], end)]
        if header.role == "assistant" and endings:
            stop = min(endings)
        elif stop == len(ids):
            stop -= max((len(tail) for tail in form.tails[header.role] if _ends_with(ids[body:], tail)), default=0)
        roles[body:stop] = Role.RESPONSE if header.role == "assistant" else Role.USER
    return roles


def _by_start_then_length(found: tuple[int, Header]) -> tuple[int, int]:
    return found[0], -len(found[1].ids)


def _find_headers(ids: Tensor, headers: Iterable[Header]) -> list[tuple[int, Header]]:
    return [(position, header) for header in headers for position in _find(ids, header.ids)]


def _find(ids: Tensor, wanted: Ids) -> list[int]:
    """All positions of a token sequence in (N,) ids."""
    if len(ids) < len(wanted):
        return []
    found = torch.ones(len(ids) - len(wanted) + 1, dtype=torch.bool)
    for offset, token in enumerate(wanted):
        found &= ids[offset : offset + len(found)] == token
    return found.nonzero().flatten().tolist()


def _ends_with(ids: Tensor, tail: Ids) -> bool:
    return len(tail) <= len(ids) and tuple(ids[len(ids) - len(tail) :].tolist()) == tail
