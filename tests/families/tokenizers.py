"""A small tokenizer of each family, with its special tokens, its kind of pieces and the chat format of its release."""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOLVLM_TEMPLATE

from tests.chat_templates import (
    GEMMA_TEMPLATE,
    LLAMA_TEMPLATE,
    LLAVA_TEMPLATE,
    QWEN_TEMPLATE,
    byte_level,
    sentence_piece,
)

QWEN3_TEMPLATE = QWEN_TEMPLATE[QWEN_TEMPLATE.index("{%- for turn") :]  # the same without a default system prompt

# The release ends answers with these four characters and a space, which are no token.
LLAVA_NEXT_TEMPLATE = """
{%- for turn in messages %}
    {%- if turn.role == 'system' %}{{ '<<SYS>>\\n' + turn.content[0].text + '\\n<</SYS>>\\n\\n' }}
    {%- elif turn.role == 'user' %}
        {{- '[INST] ' }}
        {%- for piece in turn.content if piece.type == 'image' %}{{ '<image>\\n' }}{% endfor %}
        {%- for piece in turn.content if piece.type == 'text' %}{{ piece.text }}{% endfor %}
        {{- ' [/INST]' }}
    {%- else %}{{ ' ' + turn.content[0].text + '<\\\\s> ' }}
    {%- endif %}
{%- endfor %}"""

# A space behind the role in written turns, and none in the header that asks for the next one.
ONEVISION_TEMPLATE = """
{%- for turn in messages %}
    {{- '<|im_start|>' + turn.role + ' ' }}
    {%- for piece in turn.content if piece.type == 'image' %}{{ '<image>' }}{% endfor %}
    {%- for piece in turn.content if piece.type == 'text' %}{{ '\\n' + piece.text }}{% endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

INTERNVL_TEMPLATE = QWEN3_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")

MISTRAL_TEMPLATE = """
{%- macro plain(content) %}{{ content if content is string else content[0].text }}{% endmacro %}
{{- bos_token }}
{%- set given = messages[0].role == 'system' %}
{{- '[SYSTEM_PROMPT]' + (plain(messages[0].content) if given else 'You are a helpful assistant.') }}
{{- '[/SYSTEM_PROMPT]' }}
{%- for turn in (messages[1:] if given else messages) %}
    {%- if turn.role == 'user' %}
        {{- '[INST]' }}
        {%- if turn.content is string %}{{ turn.content }}
        {%- else %}
            {%- for piece in turn.content %}{{ piece.text if piece.type == 'text' else '[IMG]' }}{% endfor %}
        {%- endif %}
        {{- '[/INST]' }}
    {%- else %}{{ plain(turn.content) + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA_PIECES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
GEMMA_PIECES = normalizers.Replace(" ", "▁")


def _wrap(tokenizer: Any, template: str, *, eos: str, pad: str, **names: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, eos_token=eos, pad_token=pad, **names
    )


def qwen(template: str = QWEN_TEMPLATE) -> PreTrainedTokenizerFast:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    control += ["<|image_pad|>", "<|video_pad|>"]
    return _wrap(byte_level(control, None), template, eos="<|im_end|>", pad="<|endoftext|>")


def qwen3() -> PreTrainedTokenizerFast:
    return qwen(QWEN3_TEMPLATE)


def llava() -> PreTrainedTokenizerFast:
    pieces = sentence_piece(["<s>", "</s>", "<pad>", "<image>"], "<s>", LLAMA_PIECES)
    return _wrap(pieces, LLAVA_TEMPLATE, eos="</s>", pad="<pad>", bos_token="<s>")


def llava_next() -> PreTrainedTokenizerFast:
    tokenizer = llava()
    tokenizer.chat_template = LLAVA_NEXT_TEMPLATE
    return tokenizer


def llava_onevision() -> PreTrainedTokenizerFast:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    return _wrap(byte_level(control, None), ONEVISION_TEMPLATE, eos="<|im_end|>", pad="<|endoftext|>")


def internvl() -> PreTrainedTokenizerFast:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    pieces = byte_level(control, None)
    return _wrap(pieces, INTERNVL_TEMPLATE, eos="<|im_end|>", pad="<|endoftext|>", extra_special_tokens=names)


def gemma3() -> PreTrainedTokenizerFast:
    control = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
    control += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    pieces = sentence_piece(control, "<bos>", GEMMA_PIECES)
    return _wrap(pieces, GEMMA_TEMPLATE, eos="<eos>", pad="<pad>", bos_token="<bos>", extra_special_tokens=names)


def smolvlm() -> PreTrainedTokenizerFast:
    control = ["<|im_start|>", "<|endoftext|>", "<fake_token_around_image>", "<image>", "<global-img>"]
    control += ["<end_of_utterance>", *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))]
    names = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    return _wrap(
        byte_level(control, None),
        SMOLVLM_TEMPLATE,
        eos="<end_of_utterance>",
        pad="<|endoftext|>",
        bos_token="<|im_start|>",
        extra_special_tokens=names,
    )


def mistral3() -> PreTrainedTokenizerFast:
    control = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    control += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    return _wrap(byte_level(control, "<s>"), MISTRAL_TEMPLATE, eos="</s>", pad="<pad>", bos_token="<s>")


def mllama() -> PreTrainedTokenizerFast:
    control = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    control += ["<|python_tag|>", "<|image|>"]  # the image last: the model has no logit for it
    pieces = byte_level(control, "<|begin_of_text|>")
    return _wrap(pieces, LLAMA_TEMPLATE, eos="<|eot_id|>", pad="<|pad|>", bos_token="<|begin_of_text|>")
