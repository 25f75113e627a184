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
    """A chat template cannot be segmented, or does not explain the token ids it is said to have made."""


def template_error(source: ChatSource, problem: str, fix: str) -> ChatTemplateError:
    """The error for a problem with the chat template of `source`, which it names."""
    tokenizer = tokenizer_of(source)
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return ChatTemplateError(f"the chat template of {name!r} {problem}; {fix}")


def tokenizer_of(source: ChatSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    tokenizer: Any = getattr(source, "tokenizer", source)
    return tokenizer


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
    """Render messages to text with the chat template of a processor, or else of its tokenizer.

    Raises:
        ChatTemplateError: there is no template, or the template refuses the messages.
    """
    tokenizer: Any = tokenizer_of(source)
    owner: Any = tokenizer if getattr(source, "chat_template", "") is None else source
    if getattr(owner, "chat_template", getattr(tokenizer, "chat_template", None)) is None:
        raise template_error(source, "is missing", "set tokenizer.chat_template, or load a model tuned for chat")
    try:
        return owner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is foreign code: it may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise template_error(
            source,
            f"failed on the roles [{roles}] ({error})",
            "order the messages as the template expects, or set a tokenizer.chat_template that takes them",
        ) from error
