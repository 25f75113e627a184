"""A small LLaVA that says the same thing whatever it is asked: real weights, set by hand.

Its layers add nothing, so that the next token follows from the last one alone, and the output matrix says which.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}assistant:"
)


def save_small_vlm(folder: Path, says: list[str]) -> None:
    """Write a model that answers with these pieces of text, one token each."""
    tokenizer = _tokenizer(says)
    size = len(tokenizer)
    text = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    _say(model, tokenizer(":" + "".join(says) + EOS, add_special_tokens=False)["input_ids"])
    model.generation_config = GenerationConfig(do_sample=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def _tokenizer(says: list[str]) -> PreTrainedTokenizerFast:
    """Bytes, and each piece of text as a token of its own."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[PAD, BOS, EOS, IMAGE])
    )
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "extra_special_tokens": {"image_token": IMAGE}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **names)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in says])
    return tokenizer


@torch.no_grad()
def _say(model: LlavaForConditionalGeneration, ids: list[int]) -> None:
    language = model.model.language_model
    for layer in language.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    size = language.embed_tokens.weight.shape[0]
    language.embed_tokens.weight.zero_()
    language.embed_tokens.weight[:, :size] = torch.eye(size)
    model.lm_head.weight.zero_()
    for token, following in pairwise(ids):
        model.lm_head.weight[following, token] = 10.0
