"""Small tokenizers and processors whose chat formats have the structure of four well-known model families.

`FAMILIES` maps a name to a function that builds its processor. The vocabularies are tiny, the structure is
not: control tokens, default system prompts, trimmed contents, alternation checks, BOS from template and
tokenizer, byte-level and SentencePiece-like tokenization, and each processor's way to expand an image are
those of the real ones.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = """user assistant system model USER ASSISTANT You are a helpful assistant. Which shape is this? What colour
has it? It is a red circle, blue square. The first and the second picture: look again. Answer in one word. No."""

QWEN_TEMPLATE = """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for turn in messages %}
    {{- '<|im_start|>' + turn.role + '\\n' }}
    {%- if turn.content is string %}{{ turn.content }}
    {%- else %}
        {%- for piece in turn.content %}
            {%- if piece.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- else %}{{ piece.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA_TEMPLATE = """
{%- macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- set seen = namespace(image=false) %}
{%- for turn in messages %}{% if turn.content is not string %}{% for piece in turn.content %}
    {%- if piece.type == 'image' %}{% set seen.image = true %}{% endif %}
{%- endfor %}{% endif %}{% endfor %}
{{- bos_token }}
{%- set given = messages[0].role == 'system' %}
{%- if given or not seen.image %}
    {{- header('system') + 'Today Date: 26 Jul 2024\\n\\n' }}
    {%- if given %}
        {%- set rules = messages[0].content %}
        {{- (rules if rules is string else rules[0].text) | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for turn in (messages[1:] if given else messages) %}
    {{- header(turn.role) }}
    {%- if turn.content is string %}{{ turn.content | trim }}
    {%- else %}
        {%- for piece in turn.content %}
            {%- if piece.type == 'image' %}{{ '<|image|>' }}{% else %}{{ piece.text | trim }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""

LLAVA_TEMPLATE = """
{%- for turn in messages %}
    {%- if turn.role != 'system' %}{{ turn.role | upper + ': ' }}{% endif %}
    {%- for piece in turn.content if piece.type == 'image' %}{{ '<image>\\n' }}{% endfor %}
    {%- for piece in turn.content if piece.type == 'text' %}
        {%- if turn.role == 'assistant' %}{% generation %}{{ piece.text + ' ' }}{% endgeneration %}
        {%- else %}{{ piece.text + ' ' }}{% endif %}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

GEMMA_TEMPLATE = """
{{- bos_token }}
{%- set rules = '' %}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set rules = messages[0].content if messages[0].content is string else messages[0].content[0].text %}
    {%- set rules = rules + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\\n' }}
    {%- if loop.first %}{{ rules }}{% endif %}
    {%- if turn.content is string %}{{ turn.content | trim }}
    {%- else %}
        {%- for piece in turn.content %}
            {%- if piece.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ piece.text | trim }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


class FakeProcessor:
    """The text side of a multimodal processor: writes each image's placeholders, then tokenizes.

    Images are given as their numbers of placeholder tokens, `expand` makes the replacement for `marker`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, marker: str, expand: Callable[[int], str] | None) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(marker)
        self.marker, self.expand = marker, expand

    def apply_chat_template(self, messages: list[dict], **kwargs: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **kwargs)

    def __call__(self, text: Sequence[str], images: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        sizes = iter(images)
        if self.expand is not None:
            text = [re.sub(re.escape(self.marker), lambda _: self.expand(next(sizes)), one) for one in text]
            assert next(sizes, None) is None
        return {"input_ids": torch.tensor([self.tokenizer(one)["input_ids"] for one in text])}


def byte_level(control: list[str], bos: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "\n\n\n"], trainer)
    return _finish(tokenizer, control, bos)


def sentence_piece(control: list[str], bos: str, normalizer: normalizers.Normalizer) -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁", "\n"]
    merges = [("\n", "\n"), ("\n\n", "\n"), ("\n\n", "\n\n")]
    for word in TEXT.split():
        left = "▁"
        for letter in word:
            merges.append((left, letter))
            left += letter
    merges = list(dict.fromkeys(merges))
    pieces += [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finish(tokenizer, control, bos)


def _finish(tokenizer: Tokenizer, control: list[str], bos: str | None) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def qwen() -> FakeProcessor:
    control = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(control, None),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=QWEN_TEMPLATE,
        name_or_path="tiny-qwen",
    )
    return FakeProcessor(tokenizer, "<|image_pad|>", lambda size: "<|image_pad|>" * size)


def llama() -> FakeProcessor:
    """Cross-attention: an image stays one token. BOS comes twice, from the template and from the tokenizer."""
    control = [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|pad|>",
        "<|image|>",
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(control, "<|begin_of_text|>"),
        bos_token="<|begin_of_text|>",
        pad_token="<|pad|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA_TEMPLATE,
        name_or_path="tiny-llama",
    )
    return FakeProcessor(tokenizer, "<|image|>", None)


def llava() -> FakeProcessor:
    """No control tokens: headers are plain words, whose spaces merge with contents. BOS from the tokenizer."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentence_piece(["<s>", "</s>", "<pad>", "<image>"], "<s>", normalizer),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=LLAVA_TEMPLATE,
        name_or_path="tiny-llava",
    )
    return FakeProcessor(tokenizer, "<image>", lambda size: "<image>" * size)


def gemma() -> FakeProcessor:
    """The processor writes line breaks around images, which merge with the header's.

    Its `image_token_id` is the token that it replaces, the tokenizer's is the placeholder.
    """
    control = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
    control += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentence_piece(control, "<bos>", normalizers.Replace(" ", "▁")),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=GEMMA_TEMPLATE,
        name_or_path="tiny-gemma",
    )
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    return FakeProcessor(
        tokenizer,
        "<start_of_image>",
        lambda size: f"\n\n<start_of_image>{'<image_soft_token>' * size}<end_of_image>\n\n",
    )


FAMILIES: dict[str, Callable[[], FakeProcessor]] = {
    "qwen": qwen,
    "llama": llama,
    "llava": llava,
    "gemma": gemma,
}
