"""Tokens of rendered conversations: their characters, BOS, and the image placeholder."""

from collections.abc import Sequence

from avar_lightning.roles.template import ChatSource, ChatTemplateError, once_per_template, template_error, tokenizer_of
from avar_lightning.roles.turns import split_conversation


def encode(text: str, source: ChatSource) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a rendered text, and the span of characters that each stands for."""
    tokenizer = tokenizer_of(source)
    if not tokenizer.is_fast:
        raise template_error(
            source,
            "cannot be matched with token ids, because a slow tokenizer reports no character offsets",
            "load the tokenizer with use_fast=True",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


def num_bos(ids: Sequence[int], source: ChatSource) -> int:
    """How many BOS tokens the ids begin with: a template writes one, and the tokenizer may add another."""
    bos = tokenizer_of(source).bos_token_id
    return next((index for index, token in enumerate(ids) if token != bos), len(ids))


@once_per_template
def image_token_id(source: ChatSource) -> int | None:
    """The id of the token that stands for a piece of an image, None where the chat template knows no images.

    Tokenizer and processor usually name it; where both do, the tokenizer is right (Gemma 3's processor names
    the token that it replaces). For a bare tokenizer it is the single added token that the template writes
    for an image, or the middle one of three: start, placeholder, end.

    Raises:
        ChatTemplateError: the template writes another number of added tokens for an image.
    """
    tokenizer = tokenizer_of(source)
    for owner in (tokenizer, source):
        named = getattr(owner, "image_token_id", None)
        if named is not None:
            return int(named)
    added = set(tokenizer.get_added_vocab().values())
    image_and_text = [{"type": "image"}, {"type": "text", "text": "x"}]
    try:
        conversation = split_conversation([{"role": "user", "content": image_and_text}], source)
    except ChatTemplateError:  # a template for text alone need not read a list of parts
        return None
    turn = conversation.turns[0]
    tokens, _ = encode(conversation.text[turn.body : turn.end], source)
    written = [token for token in tokens if token in added]
    if len(written) not in (0, 1, 3):
        raise template_error(
            source,
            f"writes {len(written)} added tokens for an image, so that its placeholder is not known",
            "pass the model's processor instead of its tokenizer",
        )
    return written[len(written) // 2] if written else None
