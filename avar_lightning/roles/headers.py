"""The token sequences that a tokenizer makes of its chat template's headers and end-of-turn markers."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from avar_lightning.roles.template import (
    ChatSource,
    ChatTemplateError,
    Message,
    once_per_template,
    template_error,
    tokenizer_of,
)
from avar_lightning.roles.tokens import encode
from avar_lightning.roles.turns import Conversation, learn_markers, split_conversation

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Tokens in front of a content of this role: the header, and in later turns the end of the turn before."""

    ids: Ids
    role: str


@dataclass(frozen=True)
class TokenFormat:
    """The token sequences around contents, each in the variants that neighbouring text can give it.

    Attributes:
        first: headers of a first turn.
        later: headers of later turns.
        ends: end-of-turn markers of assistant turns, and the tokenizer's EOS.
        tails: by role, what follows a content when the conversation ends there.
    """

    first: frozenset[Header]
    later: frozenset[Header]
    ends: frozenset[Ids]
    tails: dict[str, frozenset[Ids]]


@once_per_template
def learn_token_format(source: ChatSource) -> TokenFormat:
    """Read the token sequences around contents off probe conversations, whose turns are known.

    Raises:
        ChatTemplateError: the template cannot be segmented, or its headers merge with contents.
    """
    first: set[Header] = set()
    later: set[Header] = set()
    ends: set[Ids | None] = set()
    tails: dict[str, set[Ids | None]] = {"user": set(), "assistant": set()}
    to_assistant = learn_markers(source).joins["user", "assistant"].strip()
    for conversation in _probe_conversations(source):
        turns, last = conversation.turns, conversation.turns[-1]
        probe = _Probe(conversation.text, source)
        first |= probe.headers(turns[0].start, turns[0].body, turns[0].role)
        for turn, following in pairwise(turns):
            later |= probe.headers(turn.end, following.body, following.role)
        ends |= {probe.between(turn.end, turn.close) for turn in turns if turn.role == "assistant"}
        tails[last.role].add(probe.between(last.end, len(probe.text)))
        prompted = conversation.text + conversation.prompt
        if last.role == "user" and prompted[last.end :].strip() == to_assistant:
            later |= _Probe(prompted, source).headers(last.end, len(prompted), "assistant")
    if not first or {header.role for header in later} != {"user", "assistant"}:
        raise template_error(
            source,
            "writes headers that merge with the text beside them, so that they cannot be found in token ids",
            "put role_ids into the batch",
        )
    eos = tokenizer_of(source).eos_token_id
    return TokenFormat(
        frozenset(first),
        frozenset(later),
        _given(ends | {None if eos is None else (eos,)}),
        {role: _given(found) for role, found in tails.items()},
    )


def _given(sequences: Iterable[Ids | None]) -> frozenset[Ids]:
    return frozenset(sequence for sequence in sequences if sequence)


class _Probe:
    """A tokenized conversation."""

    def __init__(self, text: str, source: ChatSource):
        self.text = text
        self.tokens, self.offsets = encode(text, source)

    def between(self, start: int, end: int) -> Ids | None:
        """The tokens whose last character is in `[start, end)`; None if more than white space sticks to others."""
        inside = [i for i, (_, right) in enumerate(self.offsets) if start < right <= end]
        before = self.text[min((self.offsets[i][0] for i in inside), default=start) : start]
        beyond = next((left for left, right in self.offsets if left < end < right), end)
        if before.strip() or self.text[max(beyond, start) : end].strip():
            return None
        return tuple(self.tokens[i] for i in inside)

    def headers(self, start: int, end: int, role: str) -> set[Header]:
        """The header in `[start, end)`, whole and without the space at its end, which may merge with a content."""
        core = start + len(self.text[start:end].rstrip())
        return {Header(ids, role) for ids in (self.between(start, end), self.between(start, core)) if ids}


# Tokenizers treat these kinds of neighbours differently: letters, line breaks, spaces, digits, punctuation.
_EDGES = (("", ""), ("\n", "\n"), (" ", " "), ("7", "."), ("(", ")"))


def _probe_conversations(source: ChatSource) -> list[Conversation]:
    """Conversations with and without system message and images, in the content forms that the template reads."""

    def parts(text: str) -> list[Message]:
        return [{"type": "text", "text": text}]

    candidates: list[list[Message]] = []
    for left, right in _EDGES:
        text = f"{left}word{right}"
        for content in (str, parts):
            system, user, assistant = (
                {"role": role, "content": content(text)} for role in ("system", "user", "assistant")
            )
            turns = [user, assistant, user, assistant]
            candidates += [turns, turns[:3], turns[:1], [system, *turns]]
        image: Message = {"type": "image"}
        for pictured in ([image, *parts(text)], [*parts(text), image], [image]):
            user = {"role": "user", "content": pictured}
            candidates += [[user, assistant, user, assistant], [user]]
    found = []
    for messages in candidates:
        try:
            found.append(split_conversation(messages, source))
        except ChatTemplateError:  # a template may refuse strings, parts, images or a system message
            continue
    return found
