"""Chat templates: rendering messages with one, and learning something once from each."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase, ProcessorMixin

ChatSource = PreTrainedTokenizerBase | ProcessorMixin
Message = dict[str, Any]
Learned = TypeVar("Learned")


class ChatTemplateError(ValueError):
    """A chat template cannot be segmented into turns, or does not explain the token ids it is said to have made."""

    def __init__(self, source: ChatSource, problem: str, fix: str):
        tokenizer = tokenizer_of(source)
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        super().__init__(f"the chat template of {name!r} {problem}; {fix}")


def tokenizer_of(source: ChatSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(source, "tokenizer", source)


def once_per_template(learn: Callable[[ChatSource], Learned]) -> Callable[[ChatSource], Learned]:
    """Keep what `learn` finds for a tokenizer or processor until its chat template is replaced."""
    known: WeakKeyDictionary[ChatSource, tuple[object, Learned]] = WeakKeyDictionary()

    @wraps(learn)
    def lookup(source: ChatSource) -> Learned:
        template = (
            getattr(source, "chat_template", None),
            getattr(tokenizer_of(source), "chat_template", None),
        )
        if source not in known or known[source][0] != template:
            known[source] = (template, learn(source))
        return known[source][1]

    return lookup


def render(messages: Sequence[Message], source: ChatSource, *, add_generation_prompt: bool = False) -> str:
    """Render messages to text with the chat template of a processor, or of its tokenizer if only that has one.

    Raises:
        ChatTemplateError: there is no template, or the template refuses the messages.
    """
    owner = tokenizer_of(source) if getattr(source, "chat_template", "") is None else source
    try:
        return owner.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is foreign code: it may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ChatTemplateError(
            source,
            f"failed on the roles [{roles}] ({error})",
            "order the messages as the template expects, or set a tokenizer.chat_template that takes them",
        ) from error
