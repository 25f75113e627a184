"""The demo base before pretraining: a small Qwen2.5-VL's tokenizer, processor and configuration.

`make demo-base` writes these, pretrains the weights on the demo world (`configs/demo_pretrain.yaml`) and puts the
result where `load_model("demo")` finds it. The classes are those of the real model; only the sizes differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from avar_lightning.data.demo import IMAGE_SIZE, MIXTURES, STYLES, demo_samples, pretraining_samples
from avar_lightning.processing import image_only

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
Size = Literal["base", "small"]
# Text and vision settings that differ; 1.3 and 0.5 million parameters.
SIZES: dict[Size, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": (
        {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "mrope_section": [4, 6, 6]},
        {"hidden_size": 96, "intermediate_size": 256},
    ),
    "small": (
        {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "mrope_section": [4, 4, 4]},
        {"hidden_size": 64, "intermediate_size": 160},
    ),
}
MARKUP_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
# The turn structure of Qwen2.5-VL: a default system turn, images wrapped in vision markers.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_processor(*, vocab_size: int = 640, seed: int = 0) -> ProcessorMixin:
    """Train a byte-level BPE tokenizer on demo text and pair it with Qwen's image processor.

    Args:
        vocab_size: Upper bound on the vocabulary, special tokens included; any text stays encodable (bytes).
        seed: Seed of the demo text.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_demo_texts(seed), trainer)
    bpe.add_tokens(list(MARKUP_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
        model_max_length=1024,
    )
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": 4 * IMAGE_SIZE**2})
    return image_only(Qwen2_5_VLProcessor)(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def _demo_texts(seed: int, count: int = 1000) -> Iterator[str]:
    streams = [demo_samples(count, style=s, hint_rate=0.5, seed=seed, split="tokenizer") for s in STYLES]
    for stream in [*streams, *(pretraining_samples(count, stage=stage, seed=seed) for stage in MIXTURES)]:
        for sample in stream:
            for message in sample.messages:
                yield message["role"]
                content = message["content"]
                parts = [{"text": content}] if isinstance(content, str) else content
                yield from (part["text"] for part in parts if "text" in part)


def build_config(processor: ProcessorMixin, *, size: Size = "base") -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of about one million parameters for `processor`'s vocabulary, or one of less than half as many."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    text_size, vision_size = SIZES[size]
    # Dimensions of a head's half that turn with time, height and width; together half of a head.
    mrope_section = text_size["mrope_section"]
    text = {
        **{name: value for name, value in text_size.items() if name != "mrope_section"},
        "vocab_size": len(processor.tokenizer),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": mrope_section, "rope_theta": 10_000.0},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision = {
        **vision_size,
        "depth": 2,
        "num_heads": 4,
        "out_hidden_size": text_size["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def write_blank_base(folder: str | Path, *, seed: int = 0, size: Size = "base") -> Path:
    """Write processor and configuration, without weights, to `folder`; returns the folder."""
    folder = Path(folder)
    processor = build_processor(seed=seed)
    processor.save_pretrained(folder)
    build_config(processor, size=size).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where to write the tokenizer, processor and configuration")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text that the tokenizer is trained on")
    parser.add_argument("--size", choices=list(SIZES), default="base", help="of the model")
    arguments = parser.parse_args()
    print(write_blank_base(arguments.folder, seed=arguments.seed, size=arguments.size))
