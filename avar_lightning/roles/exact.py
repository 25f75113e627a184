"""Exact roles of a conversation whose messages are known."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from avar_lightning.roles.role import Role
from avar_lightning.roles.template import ChatSource, Message, template_error, tokenizer_of
from avar_lightning.roles.tokens import encode, image_token_id, num_bos
from avar_lightning.roles.turns import Conversation, num_shared, split_conversation

_CONTENT_ROLE = {"user": Role.USER, "assistant": Role.RESPONSE}


def message_roles(messages: Sequence[Message], input_ids: Tensor, processor: ChatSource) -> Tensor:
    """Exact roles of one encoded conversation.

    Args:
        messages: Hugging Face chat messages, with at least one user turn.
        input_ids: (N,) integer, unpadded: what `processor` made of the rendered messages and their images,
            with or without a generation prompt (whose tokens are OTHER).
        processor: the processor, or for ids without expanded images a bare (fast) tokenizer.

    Returns:
        (N,) int64 `Role` values.

    Raises:
        ValueError: the messages have no user turn, or a role or content that is not supported.
        ChatTemplateError: the template cannot be segmented, or the ids are not those of these messages.
    """
    if input_ids.ndim != 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected (N,); pass one conversation at a time"
        )
    conversation = split_conversation(messages, processor)
    ids = input_ids.tolist()
    for text in dict.fromkeys((conversation.text, conversation.text + conversation.prompt)):
        roles = _align(text, _character_roles(conversation, len(text), processor), ids, processor)
        if roles is not None:
            return torch.tensor(roles, dtype=torch.long, device=input_ids.device)
    raise template_error(
        processor,
        f"does not turn these {len(messages)} messages into the given {len(ids)} token ids",
        "encode processor.apply_chat_template(messages, tokenize=False) with this processor, neither padded nor cut",
    )


def _character_roles(conversation: Conversation, length: int, source: ChatSource) -> list[int]:
    """A role for each character of the conversation's text, OTHER for what follows it up to `length`."""
    roles = [int(Role.OTHER)] * length

    def fill(start: int, end: int, role: Role) -> None:
        roles[start:end] = [int(role)] * (end - start)

    for turn in conversation.turns:
        fill(turn.body, turn.close if turn.role == "assistant" else turn.end, _CONTENT_ROLE[turn.role])
    start, end = conversation.system
    bos = tokenizer_of(source).bos_token
    while bos and conversation.text.startswith(bos, start):
        start += len(bos)
    if conversation.text[start:end].strip():
        fill(start, end, Role.SYSTEM)
    return roles


@dataclass(frozen=True)
class _Stretch:
    """The text's tokens `[start, end)`, a run between images, and the place `found` in the ids where it begins."""

    start: int
    end: int
    found: int


# At most so many tokens beside an image may be merged with the line breaks that a processor writes around it.
_MAX_MERGED = 2


def _align(text: str, character_roles: list[int], ids: list[int], source: ChatSource) -> list[int] | None:
    """Roles of `ids`, which must be the tokens of `text` with every image expanded; None if they are not.

    Text between images has to be found token by token, in order and without gaps. Only a processor's
    expansion of an image is new: it must hold a placeholder, and apart from added tokens and white space no
    text of its own.
    """
    skipped, image_id = num_bos(ids, source), image_token_id(source)
    tokens, offsets = encode(text, source)
    known_bos = num_bos(tokens, source)
    tokens, offsets, ids = tokens[known_bos:], offsets[known_bos:], ids[skipped:]
    token_roles = [character_roles[end - 1] if end else int(Role.OTHER) for _, end in offsets]
    if tokens == ids:
        roles = token_roles
    else:
        markers = {image_id, getattr(source, "image_token_id", None)} - {None}
        images = [index for index, token in enumerate(tokens) if token in markers]
        stretches = _find_stretches(tokens, ids, images, image_id) if images else None
        if stretches is None:
            return None
        roles = []
        for index, stretch in enumerate(stretches):
            if index:
                before = stretches[index - 1]
                span = range(before.end, stretch.start)
                expansion = ids[len(roles) : stretch.found]
                between = [i for i in images if i in span]
                image_roles = set(token_roles[between[0] : between[-1] + 1])
                replaced = [tokens[i] for i in span]
                if len(image_roles) > 1 or not _is_expansion(expansion, replaced, image_id, source):
                    return None
                roles += [*image_roles] * len(expansion)
            roles += token_roles[stretch.start : stretch.end]
    roles = [int(Role.IMAGE) if token == image_id else role for token, role in zip(ids, roles, strict=True)]
    return [int(Role.OTHER)] * skipped + roles


def _find_stretches(
    tokens: list[int], ids: list[int], images: list[int], image_id: int | None
) -> list[_Stretch] | None:
    """Place the text between images into the ids; None if some of it is not there."""
    num_head = num_shared(tokens[: images[0]], ids)
    tail = tokens[images[-1] + 1 :]
    num_tail = num_shared(tail[::-1], ids[num_head:][::-1])
    if num_head < images[0] - _MAX_MERGED or num_tail < len(tail) - _MAX_MERGED:
        return None
    stretches = [_Stretch(0, num_head, 0)]
    position, stop = num_head, len(ids) - num_tail
    for left, right in pairwise(images):
        if right - left <= 1:
            continue  # two images side by side count as one expansion
        found = None
        trims = ((a, b) for a in range(_MAX_MERGED + 1) for b in range(_MAX_MERGED + 1))
        for trim_left, trim_right in sorted(trims, key=sum):
            start, end = left + 1 + trim_left, right - trim_right
            if start >= end or image_id not in ids[position:stop]:
                continue
            lowest = ids.index(image_id, position, stop) + 1
            found = _find_sublist(tokens[start:end], ids, lowest, stop)
            if found is not None:
                stretches.append(_Stretch(start, end, found))
                position = found + end - start
                break
        if found is None and right - left - 1 > 2 * _MAX_MERGED:
            return None
    stretches.append(_Stretch(len(tokens) - num_tail, len(tokens), stop))
    return stretches


def _find_sublist(wanted: list[int], ids: list[int], start: int, stop: int) -> int | None:
    last = stop - len(wanted) + 1
    while start < last:
        try:
            start = ids.index(wanted[0], start, last)
        except ValueError:
            return None
        if ids[start : start + len(wanted)] == wanted:
            return start
        start += 1
    return None


def _is_expansion(ids: list[int], tokens: list[int], image_id: int | None, source: ChatSource) -> bool:
    """Whether `ids` hold a placeholder, and the text of `tokens` but for added tokens and white space."""
    tokenizer = tokenizer_of(source)
    added = set(tokenizer.get_added_vocab().values())

    def words(some: list[int]) -> str:
        return "".join(str(tokenizer.decode([token for token in some if token not in added])).split())

    return image_id in ids and words(ids) == words(tokens)
