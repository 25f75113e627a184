"""Roles of a batch of which only the token ids are known."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import LongTensor, Tensor

from avar_lightning.roles.role import Role
from avar_lightning.roles.template import (
    ChatSource,
    ChatTemplateError,
    Message,
    once_per_template,
    tokenizer_of,
)
from avar_lightning.roles.tokens import encode, image_token_id, num_bos
from avar_lightning.roles.turns import Conversation, split_conversation

Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Header:
    """Tokens between a content and the next one, of which `num_closed` are the end-of-turn marker of the first."""

    ids: Ids
    role: str
    num_closed: int = 0


@dataclass(frozen=True)
class _Format:
    """The token sequences around contents, each in the variants that neighbouring text can give it."""

    first: frozenset[_Header]
    later: frozenset[_Header]
    ends: frozenset[Ids]
    tails: dict[str, frozenset[Ids]]


def tag_roles(
    input_ids: Tensor, tokenizer: ChatSource, *, attention_mask: Tensor | None = None
) -> LongTensor:
    """Roles of a batch that brings only token ids, found by the header tokens of the tokenizer's chat template.

    What a model generated after the last assistant header is RESPONSE up to its end-of-turn token. Agrees with
    `message_roles` but for control tokens that a user typed, and for a system message that the template puts inside the
    first user turn without a mark of its own (Gemma): that text is USER here.

    Args:
        input_ids: (B, N) integer, padded on either side.
        tokenizer: the tokenizer, or the processor around it.
        attention_mask: (B, N), zero on padding. Without it, padding is the runs of `pad_token_id` at both ends.

    Returns:
        (B, N) int64 `Role` values, on the device of `input_ids`.

    Raises:
        ValueError: wrong shapes, or a row without a user turn.
        ChatTemplateError: the template cannot be segmented, or not by its tokens.
    """
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected (B, N); add the batch dimension"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(input_ids.shape)}; "
            "pass the mask of the same batch"
        )
    form = _learn_format(tokenizer)
    ids = input_ids.cpu()
    real = _find_real(ids, tokenizer, form) if attention_mask is None else attention_mask.cpu().bool()
    roles = torch.full_like(ids, Role.OTHER, dtype=torch.long)
    for row in range(len(ids)):
        row_roles = _tag_row(ids[row, real[row]], form, tokenizer)
        if row_roles is None:
            raise ValueError(
                f"row {row} of input_ids has no user turn in the chat format of the tokenizer; pass the tokenizer that "
                "encoded the batch, or put role_ids into it"
            )
        roles[row, real[row]] = row_roles
    image_id = image_token_id(tokenizer)
    if image_id is not None:
        roles[real & (ids == image_id)] = Role.IMAGE
    return roles.to(input_ids.device)  # type: ignore[return-value]


def _find_real(ids: Tensor, source: ChatSource, form: _Format) -> Tensor:
    """(B, N) bool, True off the runs of padding at both ends.

    A padding token that also ends turns is kept once on the right, since it may be the end of a response.
    """
    pad = tokenizer_of(source).pad_token_id
    content = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
    right = content.flip(1).cumsum(1).flip(1) > 0
    if (pad,) in form.ends:
        right[:, 1:] |= right[:, :-1].clone()
    return (content.cumsum(1) > 0) & right


def _tag_row(ids: Tensor, form: _Format, source: ChatSource) -> Tensor | None:
    """Roles of one row without padding, images still USER; None if it has no user turn."""
    roles = torch.full_like(ids, Role.OTHER, dtype=torch.long)
    opening = min(_find_headers(ids, form.first), default=None, key=_by_start_then_length)
    if opening is None:
        return None
    start, header = opening
    skipped = num_bos(ids[:start].tolist(), source)
    roles[skipped:start] = Role.SYSTEM

    body = start + len(header.ids)
    turns = [
        (header.role, body, len(ids))
    ]  # role, first token of the content, last token before the next header + 1
    for position, following in sorted(_find_headers(ids[body:], form.later), key=_by_start_then_length):
        position += body
        role, begin, _ = turns[-1]
        if position < begin:
            continue  # a shorter variant of the header that was just taken
        turns[-1] = (role, begin, position + (following.num_closed if role == "assistant" else 0))
        turns.append((following.role, position + len(following.ids), len(ids)))

    for role, begin, end in turns:
        content = ids[begin:end]
        endings = [at + len(end_ids) for end_ids in form.ends for at in _find(content, end_ids)]
        if role == "assistant" and endings:
            length = min(endings)
        elif end == len(ids):
            length = len(content) - max(
                map(len, (tail for tail in form.tails[role] if _ends_with(content, tail))), default=0
            )
        else:
            length = len(content)
        roles[begin : begin + length] = Role.RESPONSE if role == "assistant" else Role.USER
    return roles


def _by_start_then_length(found: tuple[int, _Header]) -> tuple[int, int]:
    return found[0], -len(found[1].ids)


def _find_headers(ids: Tensor, headers: Iterable[_Header]) -> list[tuple[int, _Header]]:
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


@once_per_template
def _learn_format(source: ChatSource) -> _Format:
    """Read the token sequences around contents off probe conversations, whose turns are known.

    Contents of several kinds stand beside the headers, because a tokenizer may merge the white space of a header
    with what it touches.
    """
    first, later, ends = set(), set(), set()
    tails: dict[str, set[Ids]] = {"user": set(), "assistant": set()}
    for conversation in _probe_conversations(source):
        turns, text = conversation.turns, conversation.text
        tokens, offsets = encode(text, source)
        probe = _Probe(text, tokens, offsets)
        opening = probe.between(turns[0].start, turns[0].body)
        if opening is not None:
            first.add(_Header(opening, turns[0].role))
        for turn, following in pairwise(turns):
            join = probe.between(turn.end, following.body)
            if join is not None:
                later.add(_Header(join, following.role, len(probe.between(turn.end, turn.close) or ())))
        ends.update(probe.between(turn.end, turn.close) for turn in turns if turn.role == "assistant")
        tails[turns[-1].role].add(probe.between(turns[-1].end, len(text)) or ())
    if not first or {header.role for header in later} != {"user", "assistant"}:
        raise ChatTemplateError(
            source,
            "writes headers that merge with the text beside them, so that they cannot be found in token ids",
            "put role_ids into the batch",
        )
    eos = tokenizer_of(source).eos_token_id
    return _Format(
        frozenset(first),
        frozenset(later),
        frozenset({found for found in ends if found} | ({(eos,)} if eos is not None else set())),
        {role: frozenset(found) - {()} for role, found in tails.items()},
    )


@dataclass(frozen=True)
class _Probe:
    """A tokenized conversation."""

    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]]

    def between(self, start: int, end: int) -> Ids | None:
        """The tokens whose last character is in `[start, end)`; None if more than white space sticks to others."""
        inside = [i for i, (_, right) in enumerate(self.offsets) if start < right <= end]
        before = self.text[min((self.offsets[i][0] for i in inside), default=start) : start]
        beyond = next((left for left, right in self.offsets if left < end < right), end)
        if before.strip() or self.text[max(beyond, start) : end].strip():
            return None
        return tuple(self.tokens[i] for i in inside)


_EDGES = [("", ""), ("\n", "\n"), (" ", " "), ("7", "."), ("(", ")")]


def _probe_conversations(source: ChatSource) -> list[Conversation]:
    """Conversations with and without system message and image, in the content form that the template reads."""

    def parts(text: str) -> list[Message]:
        return [{"type": "text", "text": text}]

    def image_parts(text: str) -> list[Message]:
        return [{"type": "image"}, *parts(text)]

    roles = ("user", "assistant", "user", "assistant")
    candidates: list[list[Message]] = []
    for left, right in _EDGES:
        text = f"{left}word{right}"
        for content in (str, parts):
            plain = [{"role": role, "content": content(text)} for role in roles]
            candidates += [plain, plain[:3], [{"role": "system", "content": content(text)}, *plain]]
        with_image = [
            {"role": r, "content": image_parts(text) if r == "user" else parts(text)} for r in roles
        ]
        candidates += [with_image]
    found = []
    refusal: ChatTemplateError | None = None
    for messages in candidates:
        try:
            found.append(split_conversation(messages, source))
        except (
            ChatTemplateError
        ) as error:  # a template may refuse system messages, or strings, or parts, or images
            refusal = error
    if refusal is not None and not found:
        raise refusal
    return found
