"""What records of each format mean: messages, images, and what else is known. Pure functions, one a format."""

from __future__ import annotations

import ast
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avar_lightning.conversion.config import FIELD_NAMES, ConvertConfig
from avar_lightning.conversion.fields import Fields, plain
from avar_lightning.conversion.rejecting import BadRecord, short
from avar_lightning.conversion.turns import Turn, build_messages
from avar_lightning.data.sample import Sample

MAX_OPTIONS = 10_000  # characters of options that are written as text


@dataclass
class Draft:
    """A sample whose images are still references.

    Attributes:
        messages: Chat messages, an image part for each image.
        images: Where the images are, in the order of their parts.
        answer: As in :class:`~avar_lightning.data.sample.Sample`, like the rest.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    answer: Any = None
    id: str = ""
    source: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    def sample(self, key: str) -> Sample:
        """The sample under a key; its images go into the shard as they are."""
        known = {"answer": self.answer, "id": self.id, "source": self.source, "columns": self.columns}
        return Sample(self.messages, key=key, **known)


Format = Callable[[Mapping[str, Any], ConvertConfig], Draft | None]
"""What a record means; None for one that is left out without complaint."""


def conversation(record: Mapping[str, Any], config: ConvertConfig) -> Draft:
    """ShareGPT, LLaVA and LLaMA-Factory, and messages of Hugging Face: a list of turns, by whatever names.

    >>> turns = [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    >>> draft = conversation({"conversations": turns, "image": "cat.png"}, ConvertConfig("cats.json", "shards"))
    >>> draft.messages[0]["content"], draft.images
    ([{'type': 'image'}, {'type': 'text', 'text': 'What?'}], ['cat.png'])
    """
    fields = Fields(record, config)
    turns = fields.take("messages")
    if not isinstance(turns, list) or not turns:
        names = " or ".join(config.names("messages"))
        raise BadRecord("no conversation", f"{names} is {short(turns)}; expected a list of turns")
    return _draft(fields, config, [Turn.of(turn, index) for index, turn in enumerate(turns)])


def alpaca(record: Mapping[str, Any], config: ConvertConfig) -> Draft:
    """Alpaca as LLaMA-Factory reads it: the input follows the instruction on a new line; history goes before."""
    fields = Fields(record, config)
    question = "\n".join(text for text in (fields.text("instruction"), fields.text("input")) if text)
    if not question:
        raise BadRecord("no question", "instruction and input are empty; expected text in one of them")
    history = fields.take("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRecord("bad history", f"history is {short(history)}; expected pairs [question, answer]")
    turns = [Turn(role, text) for pair in history for role, text in zip(("user", "assistant"), pair)]
    turns.append(Turn("user", question))
    turns += _response(fields.text("output"), "output")
    return _draft(fields, config, turns)


def columns(record: Mapping[str, Any], config: ConvertConfig) -> Draft:
    """A table with a column for the question, and maybe for images, options, response and answer.

    The images stand before the question unless it says ``<image>``. Options follow it, each on a line with its letter,
    and are kept as the column ``options``. Without a response the sample is a prompt.
    """
    fields = Fields(record, config)
    question = fields.text("question")
    if not question:
        names = " or ".join(config.names("question"))
        raise BadRecord("no question", f"there is no text in {names}; expected a question (--column question=NAME)")
    answer = fields.take("answer")
    response = _response(fields.text("response"), "response")
    options = _options(fields.take("options"))
    shown = question
    if options:
        lines = lettered(options)
        missing = not all(line in question for line in lines)
        shown = "\n".join([question, *lines]) if missing else question
    turns = [Turn("user", shown), *response]
    more = {"options": options} if options else {}
    return _draft(fields, config, turns, answer=answer, prepend=True, more=more)


FORMATS: dict[str, Format] = {
    "sharegpt": conversation,
    "messages": conversation,
    "alpaca": alpaca,
    "columns": columns,
}


def detect_format(names: Iterable[str], config: ConvertConfig) -> str:
    """The format of records that have fields of these names.

    Raises:
        ValueError: When they fit none; the message names them.

    >>> detect_format(["id", "conversations"], ConvertConfig("a.json", "shards"))
    'sharegpt'
    """
    found = set(names)

    def has(ours: str) -> bool:
        return any(name in found for name in config.names(ours))

    if has("messages"):
        return "sharegpt" if "conversations" in found else "messages"
    if has("instruction") and has("output"):
        return "alpaca"
    if has("question"):
        return "columns"
    raise ValueError(
        f"the first records have the fields {', '.join(sorted(found)) or '(none)'}, which fit no format; expected "
        "messages, conversations, instruction and output, or a question: pass --format with one of "
        f"{', '.join(FORMATS)} and name the fields, as in --column question=NAME ({', '.join(FIELD_NAMES)})"
    )


def _draft(
    fields: Fields,
    config: ConvertConfig,
    turns: list[Turn],
    *,
    answer: Any = None,
    prepend: bool = False,
    more: Mapping[str, Any] | None = None,
) -> Draft:
    fields.refuse_other_media()
    system = fields.text("system")
    starts = turns[0].role == "system"
    if starts and system:
        raise BadRecord("two system prompts", f"the turns begin with a system prompt, and system is {short(system)}")
    if not starts and (system or config.system):
        turns = [Turn("system", system or config.system), *turns]
    if answer is None:
        answer = fields.take("answer", usual=False)  # elsewhere a `solution` or `label` need not be the answer
    name, source = fields.take("id"), fields.take("source")
    messages, images = build_messages(turns, fields.images(), prepend=prepend or config.prepend_images)
    return Draft(
        messages=messages,
        images=images,
        answer=plain(answer, "answer"),
        id="" if name is None else str(name),
        source=config.source if source is None else str(source),
        columns=fields.columns(**(more or {})),
    )


def _response(text: str | None, name: str) -> list[Turn]:
    if text is not None and not text.strip():
        raise BadRecord("empty response", f"{name} is {short(text)}; expected text, or null for a prompt without one")
    return [] if text is None else [Turn("assistant", text)]


def _options(value: Any) -> Any:
    """Options as a list or a mapping from letters; some sets write either as text."""
    if isinstance(value, str):
        value = _literal(value) if value.strip() else None
    if isinstance(value, Mapping):
        return {str(letter): text for letter, text in plain(value, "options").items() if text is not None}
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > len(string.ascii_uppercase):
        raise BadRecord("bad options", f"options are {short(value)}; expected a list of at most 26 texts or a mapping")
    return plain(value, "options")


def _literal(text: str) -> Any:
    if len(text) >= MAX_OPTIONS:  # Python's own reader is no match for any text of any length
        raise BadRecord(
            "bad options", f"options are {len(text)} characters of text; expected fewer than {MAX_OPTIONS}, or a list"
        )
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise BadRecord("bad options", f"options are {short(text)}; expected a list of texts or a mapping from letters")


def lettered(options: Sequence[Any] | Mapping[str, Any]) -> list[str]:
    """A line for each option, with its letter unless all have their own.

    >>> lettered(["cat", "dog"])
    ['A. cat', 'B. dog']
    >>> lettered({"A": "(A) cat", "B": "(B) dog"})
    ['(A) cat', '(B) dog']
    """
    pairs = options.items() if isinstance(options, Mapping) else zip(string.ascii_uppercase, options)
    texts = [(letter, str(text)) for letter, text in pairs]
    own = all(text.startswith((f"{letter}.", f"({letter})", f"{letter})", f"{letter}:")) for letter, text in texts)
    return [text if own else f"{letter}. {text}" for letter, text in texts]
