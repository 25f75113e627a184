"""Where each turn of a rendered conversation begins and ends, in characters.

A chat template is a program, so nothing is assumed about its text. Every message's text is replaced by a
sentinel that the user cannot have typed, and what the template writes between the sentinels (the frame) shows
its headers and end-of-turn markers. The frame plus what the template makes of each text must give the real
rendering back, character for character; if not, the template is refused.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from avar_lightning.roles.template import (
    ChatSource,
    ChatTemplateError,
    Message,
    once_per_template,
    render,
    template_error,
    tokenizer_of,
)


@dataclass(frozen=True)
class Turn:
    """One user or assistant turn: header `[start, body)`, content `[body, end)`, end-of-turn marker `[end, close)`."""

    role: str
    start: int
    body: int
    end: int
    close: int


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: its turns in order, and the span of its system part (empty if it has none).

    `prompt` is what a generation prompt appends to the text.
    """

    text: str
    turns: list[Turn]
    system: tuple[int, int]
    prompt: str


@dataclass(frozen=True)
class Markers:
    """What a template writes around contents; the keys are roles.

    Attributes:
        opens: the header in front of a content, in the form it has in the first turn.
        joins: everything between a content and the content of the next turn.
        closes: the part of a join that belongs to the turn that ends, and not to the next header.
        tails: what follows a content when the conversation ends there.
        system_gap: text between the system's and the user's content where a template puts both into one turn.
    """

    opens: dict[str, str]
    joins: dict[tuple[str, str], str]
    closes: dict[str, str]
    tails: dict[str, str]
    system_gap: str


def split_conversation(messages: Sequence[Message], source: ChatSource) -> Conversation:
    """Render a conversation and find its turns.

    Args:
        messages: an optional system message, then user and assistant messages; `content` is a string or a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}` parts.
        source: the tokenizer, or the processor around it.

    Returns:
        The text (without generation prompt) and, as character positions in it, its turns.

    Raises:
        ValueError: the messages have no user turn, or a role or content that is not supported.
        ChatTemplateError: the template cannot be segmented.
    """
    _check_messages(messages)
    frame, slots = _render_frame(messages, source)
    turns, system = _find_turns([message["role"] for message in messages], frame, slots, learn_markers(source), source)
    text, shift = _fill_frame(messages, frame, slots, source)
    turns = [Turn(t.role, shift(t.start), shift(t.body), shift(t.end), shift(t.close)) for t in turns]
    prompted = render(messages, source, add_generation_prompt=True)
    prompt = prompted[len(text) :] if prompted.startswith(text) else ""
    return Conversation(text, turns, (shift(system[0]), shift(system[1])), prompt)


@once_per_template
def learn_markers(source: ChatSource) -> Markers:
    """Learn a template's headers and end-of-turn markers from conversations whose contents are sentinels.

    Raises:
        ChatTemplateError: the template drops, repeats or reorders contents, or does not mark whose turn it is.
    """
    probe = _make_probe(source)
    head, after_user, after_assistant, _, _ = probe("user", "assistant", "user", "assistant")
    tails = {"user": probe("user")[-1], "assistant": probe("user", "assistant")[-1]}
    close_user = _common_start(tails["user"], after_user, source)
    close_assistant = _common_start(tails["assistant"], after_assistant, source)
    open_assistant = after_user.removeprefix(close_user)
    # The first header may lack the separator that later ones begin with, so what they share identifies it.
    open_user = _common_end(head, after_assistant.removeprefix(close_assistant), source)
    if not open_user.strip() or not after_user.strip() or after_user == after_assistant:
        raise template_error(
            source,
            "does not mark where user and assistant turns begin",
            "set a tokenizer.chat_template that writes a header for each role",
        )
    try:
        system_gap = probe("system", "user")[1]
    except ChatTemplateError:  # the template takes no system message, which is its right
        system_gap = ""
    return Markers(
        opens={"user": open_user, "assistant": open_assistant},
        joins={
            ("user", "assistant"): after_user,
            ("assistant", "user"): after_assistant,
            ("user", "user"): close_user + after_assistant.removeprefix(close_assistant),
            ("assistant", "assistant"): close_assistant + open_assistant,
        },
        closes={"user": close_user, "assistant": close_assistant},
        tails=tails,
        system_gap=system_gap,
    )


def _make_probe(source: ChatSource) -> Callable[..., list[str]]:
    """A function from roles to what the template writes around contents, in the content form that it reads."""

    def probe_as(content: Callable[[str], Any], *roles: str) -> list[str]:
        messages = [{"role": role, "content": content("x")} for role in roles]
        frame, slots = _render_frame(messages, source)
        edges = [0, *(edge for slot in slots for edge in (slot.start, slot.end)), len(frame)]
        return [frame[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]

    def as_parts(text: str) -> list[Message]:
        return [{"type": "text", "text": text}]

    try:
        probe_as(str, "user", "assistant")
    except ChatTemplateError:
        return lambda *roles: probe_as(as_parts, *roles)
    return lambda *roles: probe_as(str, *roles)


@dataclass(frozen=True)
class _Slot:
    """The place of one message text: in the messages, and where its sentinel stands in the frame."""

    message: int
    part: int | None
    text: str
    start: int = 0
    end: int = 0


def _check_messages(messages: Sequence[Message]) -> None:
    roles = [message.get("role") for message in messages]
    if "user" not in roles:
        raise ValueError(f"the messages have the roles {roles} and no user turn; add a message with role 'user'")
    for index, role in enumerate(roles):
        if role not in ("user", "assistant") and (role != "system" or index > 0):
            raise ValueError(
                f"message {index} has the role {role!r}; begin with at most one 'system' message, then use 'user' "
                "and 'assistant'"
            )
        content = messages[index].get("content")
        if not isinstance(content, str | list):
            raise ValueError(
                f"message {index} has content of type {type(content).__name__}, expected str or list; give a "
                "string or a list of parts"
            )


def _text_slots(messages: Sequence[Message]) -> list[_Slot]:
    """All texts of the messages. Blank ones get no slot: templates may treat them as absent."""
    slots = []
    for index, message in enumerate(messages):
        content = message["content"]
        parts: Iterable[tuple[int | None, str]] = (
            [(None, content)]
            if isinstance(content, str)
            else [(part, item["text"]) for part, item in enumerate(content) if item.get("type") == "text"]
        )
        slots += [_Slot(index, part, text) for part, text in parts if text.strip()]
    return slots


def _replace_texts(messages: Sequence[Message], slots: Iterable[_Slot], texts: Iterable[str]) -> list[Message]:
    replaced = [dict(message) for message in messages]
    for slot, text in zip(slots, texts, strict=True):
        message = replaced[slot.message]
        if slot.part is None:
            message["content"] = text
        else:
            parts = list(message["content"])
            parts[slot.part] = {**parts[slot.part], "text": text}
            message["content"] = parts
    return replaced


def _sentinels(slots: Sequence[_Slot]) -> list[str]:
    """One unique string a slot, bracketed by a private-use character that occurs in none of the texts."""
    typed = set().union(*(slot.text for slot in slots))
    bracket = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in typed)
    return [f"{bracket}{index}{bracket}" for index in range(len(slots))]


def _render_frame(messages: Sequence[Message], source: ChatSource) -> tuple[str, list[_Slot]]:
    slots = _text_slots(messages)
    sentinels = _sentinels(slots)
    frame = render(_replace_texts(messages, slots, sentinels), source)
    placed: list[_Slot] = []
    for slot, sentinel in zip(slots, sentinels, strict=True):
        start = frame.find(sentinel)
        if frame.count(sentinel) != 1 or (placed and start < placed[-1].end):
            role = messages[slot.message]["role"]
            raise template_error(
                source,
                f"drops, repeats or reorders the text of message {slot.message} ({role})",
                "give its content in the form that the template reads (a string, or a list of parts), or set "
                "a tokenizer.chat_template that writes every message once",
            )
        placed.append(replace(slot, start=start, end=start + len(sentinel)))
    return frame, placed


def _find_turns(
    roles: list[str], frame: str, slots: list[_Slot], markers: Markers, source: ChatSource
) -> tuple[list[Turn], tuple[int, int]]:
    """Find the turns in a frame, which holds no text that a user typed, and the span of the system part."""

    def refuse(index: int) -> ChatTemplateError:
        return template_error(
            source,
            f"writes no recognisable boundary around message {index} ({roles[index]})",
            "set a tokenizer.chat_template that writes one header and one end marker around all turns of a role",
        )

    def latest_start(index: int) -> int:
        return min((slot.start for slot in slots if slot.message >= index), default=len(frame))

    def earliest_end(index: int) -> int:
        return max((slot.end for slot in slots if slot.message <= index), default=0)

    first = int(roles[0] == "system")
    whole = markers.opens[roles[first]]
    system_end = earliest_end(first - 1)
    opening = whole if frame.find(whole, system_end, latest_start(first)) >= 0 else whole.rstrip()
    start = frame.find(opening, system_end, latest_start(first))
    system = (0, start)
    if start < 0:  # the system text stands inside the first user turn, or the header is not there at all
        opening = whole
        start = frame.rfind(opening, 0, latest_start(0))
        system = (start + len(opening), system_end + len(markers.system_gap))
        if start < 0 or not system_end or not frame.startswith(markers.system_gap, system_end):
            raise refuse(first)

    starts, bodies, ends, closes = [start], [start + len(opening)], [], []
    for index, (role, following) in enumerate(pairwise(roles[first:]), first + 1):
        join, close = markers.joins[role, following], markers.closes[role]
        low, high = max(bodies[-1], earliest_end(index - 1)), latest_start(index)
        forms = ((frame.find(form, low, high), form, omitted) for form, omitted in _without_space(join))
        end, form, omitted = next((found for found in forms if found[0] >= 0), (-1, "", 0))
        if end < 0:
            raise refuse(index)
        ends.append(end)
        closes.append(max(end, end - omitted + len(close.rstrip())))
        starts.append(max(end, end - omitted + len(close)))
        bodies.append(end + len(form))
    tail = markers.tails[roles[-1]]
    low = max(bodies[-1], earliest_end(len(roles)))
    tails = [(form, omitted) for form, omitted in ((tail, 0), _left_trimmed(tail)) if frame.endswith(form)]
    form, omitted = next((found for found in tails if len(frame) - len(found[0]) >= low), ("", -1))
    if omitted < 0:
        raise refuse(len(roles) - 1)
    end = len(frame) - len(form)
    ends.append(end)
    closes.append(max(end, end - omitted + len(tail.rstrip())))
    return [Turn(*turn) for turn in zip(roles[first:], starts, bodies, ends, closes, strict=True)], system


def _without_space(marker: str) -> list[tuple[str, int]]:
    """A marker, and what is left of it where a template writes its outer space beside texts alone.

    Each with the number of characters that it lacks on the left.
    """
    left, omitted = _left_trimmed(marker)
    return [(marker, 0), (left, omitted), (marker.rstrip(), 0), (left.rstrip(), omitted)]


def _left_trimmed(marker: str) -> tuple[str, int]:
    return marker.lstrip(), len(marker) - len(marker.lstrip())


def _fill_frame(
    messages: Sequence[Message], frame: str, slots: list[_Slot], source: ChatSource
) -> tuple[str, Callable[[int], int]]:
    """Find what the template makes of each text, and how positions of the frame move when texts are put in.

    Each text is rendered among the sentinels of all others, so its surroundings are known, whatever it says.
    A template may trim it, or let it change the pieces of frame beside it (moving a `<think>` block, say):
    then only what is left of those pieces counts as frame.
    """
    sentinels = [frame[slot.start : slot.end] for slot in slots]
    edges = [0, *(edge for slot in slots for edge in (slot.start, slot.end)), len(frame)]
    kept = [list(piece) for piece in zip(edges[::2], edges[1::2], strict=True)]
    written = []
    for index, slot in enumerate(slots):
        before, after = frame[: edges[2 * index]], frame[edges[2 * index + 3] :]
        texts = [*sentinels[:index], slot.text, *sentinels[index + 1 :]]
        alone = render(_replace_texts(messages, slots, texts), source)
        if not (alone.startswith(before) and alone.endswith(after)):
            raise _unexplained(source)
        here = alone[len(before) : len(alone) - len(after)]
        left, right = frame[len(before) : slot.start], frame[slot.end : len(frame) - len(after)]
        num_left = num_shared(here, left)
        num_right = num_shared(here[num_left:][::-1], right[::-1])
        written.append(here[num_left : len(here) - num_right])
        kept[index][1] -= len(left) - num_left
        kept[index + 1][0] += len(right) - num_right

    text = render(messages, source)
    rebuilt, spans = "", []
    for (start, end), content in zip(kept, [*written, ""], strict=True):
        spans.append((start, end, len(rebuilt)))
        rebuilt += frame[start:end] + content
    if rebuilt != text:
        raise _unexplained(source)

    def shift(position: int) -> int:
        for start, end, moved in spans:
            if start <= position <= end:
                return moved + position - start
        raise _unexplained(source)

    return text, shift


def _unexplained(source: ChatSource) -> ChatTemplateError:
    return template_error(
        source,
        "lets the text of one message change how others are written",
        "set a tokenizer.chat_template that writes every message by itself",
    )


def _atoms(text: str, source: ChatSource) -> list[str]:
    """Characters, with added tokens kept whole, so that `<|a|>` and `<|b|>` have nothing in common."""
    added = sorted(tokenizer_of(source).get_added_vocab(), key=len, reverse=True)
    return re.findall("|".join([*map(re.escape, added), "(?s:.)"]), text)


def _common_start(first: str, second: str, source: ChatSource) -> str:
    atoms = _atoms(first, source)
    return "".join(atoms[: num_shared(atoms, _atoms(second, source))])


def _common_end(first: str, second: str, source: ChatSource) -> str:
    atoms = _atoms(first, source)
    return "".join(atoms[len(atoms) - num_shared(atoms[::-1], _atoms(second, source)[::-1]) :])


def num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
