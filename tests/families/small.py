"""A small model of each family: real classes of transformers, random weights, a few dozen thousand parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

from avar_lightning.processing import find_processor_class, image_only
from tests.families import tokenizers

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # With the usual 0.02, attention is almost uniform, and nothing would be tested.
    "initializer_range": 0.3,
}
VISION: dict[str, Any] = SIZE | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
SQUARE = {"height": 28, "width": 28}
Ids = Callable[[str], int]


@dataclass(frozen=True)
class SmallFamily:
    """How to make one; `config` gets the text model's sizes and the tokenizer's ids.

    Attributes:
        processor: Name of the processor's class, and its options.
        image_processor: The same of the image processor.
        layers: Decoder layers that have masses.
        ends: What ends an answer beside the tokenizer's end token, as the release's generation settings say.
    """

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    config: Callable[[dict[str, Any], Ids], PreTrainedConfig]
    processor: tuple[str, dict[str, Any]]
    image_processor: tuple[str, dict[str, Any]]
    layers: tuple[int, ...] = (0, 1)
    ends: tuple[str, ...] = ()

    def make_processor(self) -> ProcessorMixin:
        (name, options), (image_name, image_options) = self.processor, self.image_processor
        tokenizer = self.tokenizer()
        image_processor = getattr(hf, image_name)(**image_options)
        return image_only(find_processor_class(name))(
            image_processor, tokenizer, chat_template=tokenizer.chat_template, **options
        )

    def make_config(self, processor: Any) -> PreTrainedConfig:
        tokenizer = processor.tokenizer
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        text = SIZE | special | {"vocab_size": len(tokenizer), "num_key_value_heads": 2}
        return self.config(text, tokenizer.convert_tokens_to_ids)

    def write(self, folder: Path) -> Path:
        """A model folder as they come from the hub."""
        torch.manual_seed(0)
        processor = self.make_processor()
        model = hf.AutoModelForImageTextToText.from_config(self.make_config(processor))
        for name, parameter in model.named_parameters():
            # What starts at 0 (Llama-3.2-Vision's gates, Gemma's projection) would let no picture through.
            if name.endswith("gate"):
                torch.nn.init.ones_(parameter)
            elif not parameter.any() and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        ends = [processor.tokenizer.convert_tokens_to_ids(token) for token in self.ends]
        model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *ends]
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder


def qwen2_vl(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.3}
    return hf.Qwen2VLConfig(text_config=text | {"rope_parameters": MROPE}, vision_config=vision, **_qwen_ids(ids))


def qwen2_5_vl(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "initializer_range": 0.3}
    return hf.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": MROPE}, vision_config=vision, **_qwen_ids(ids))


def qwen3_vl(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "initializer_range": 0.3}
    text = text | {"rope_parameters": MROPE | {"mrope_interleaved": True}, "head_dim": 8}
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(ids))


def _qwen_ids(ids: Ids) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start"}
    names |= {"vision_end_token_id": "vision_end"}
    return {name: ids(f"<|{token}|>") for name, token in names.items()}


def llava(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**text),
        image_token_index=ids("<image>"),
        vision_feature_layer=-2,
    )


def llava_next(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.MistralConfig(**text),
        image_token_index=ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )


def llava_onevision(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Qwen2Config(**text),
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def internvl(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    vision = VISION | {"image_size": [28, 28], "patch_size": [7, 7]}
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**vision),
        text_config=hf.Qwen2Config(**text),
        image_token_id=ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def gemma3(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    layers = ["sliding_attention", "full_attention"]
    text = text | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": layers}
    return hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
    )


def smolvlm(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    return hf.SmolVLMConfig(
        vision_config=VISION | {"patch_size": 7},
        text_config=hf.LlamaConfig(**text),
        image_token_id=ids("<image>"),
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
    )


def mistral3(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    vision = hf.PixtralVisionConfig(**VISION | {"image_size": 112})
    return hf.Mistral3Config(
        vision_config=vision,
        text_config=hf.MistralConfig(**text, head_dim=8, sliding_window=None),
        image_token_index=ids("[IMG]"),
        tie_word_embeddings=False,
    )


def mllama(text: dict[str, Any], ids: Ids) -> PreTrainedConfig:
    image = ids("<|image|>")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = text | {"vocab_size": image, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope}
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {name: value for name, value in VISION.items() if name != "num_attention_heads"}
    vision |= {"attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64, "max_num_tiles": 4}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": ratios}
    return hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)


QWEN_IMAGES = ("Qwen2VLImageProcessorPil", {"size": {"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}})
QWEN3_IMAGES = (
    "Qwen2VLImageProcessorPil",
    {"patch_size": 16, "size": {"shortest_edge": 32 * 32, "longest_edge": 4 * 64 * 64}},
)
CLIP_IMAGES = {"size": {"shortest_edge": 28}, "crop_size": SQUARE}
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
ONEVISION = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
TILES = {"size": SQUARE, "min_patches": 1, "max_patches": 3}
CROPS = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}

FAMILIES = {
    "Qwen2-VL": SmallFamily(tokenizers.qwen, qwen2_vl, ("Qwen2VLProcessor", {}), QWEN_IMAGES),
    "Qwen2.5-VL": SmallFamily(tokenizers.qwen, qwen2_5_vl, ("Qwen2_5_VLProcessor", {}), QWEN_IMAGES),
    "Qwen3-VL": SmallFamily(tokenizers.qwen3, qwen3_vl, ("Qwen3VLProcessor", {}), QWEN3_IMAGES),
    "LLaVA-1.5": SmallFamily(
        tokenizers.llava, llava, ("LlavaProcessor", LLAVA), ("LlavaImageProcessorPil", CLIP_IMAGES)
    ),
    "LLaVA-NeXT": SmallFamily(
        tokenizers.llava_next,
        llava_next,
        ("LlavaNextProcessor", LLAVA),
        ("LlavaNextImageProcessorPil", CLIP_IMAGES | {"image_grid_pinpoints": PINPOINTS}),
    ),
    "LLaVA-OneVision": SmallFamily(
        tokenizers.llava_onevision,
        llava_onevision,
        ("LlavaOnevisionProcessor", ONEVISION),
        ("LlavaOnevisionImageProcessorPil", {"size": SQUARE, "image_grid_pinpoints": PINPOINTS}),
    ),
    "InternVL": SmallFamily(
        tokenizers.internvl,
        internvl,
        ("InternVLProcessor", {"image_seq_length": 4}),
        ("GotOcr2ImageProcessorPil", TILES),
    ),
    "Gemma 3": SmallFamily(
        tokenizers.gemma3,
        gemma3,
        ("Gemma3Processor", {"image_seq_length": 4}),
        ("Gemma3ImageProcessorPil", {"size": SQUARE}),
        ends=("<end_of_turn>",),
    ),
    "SmolVLM": SmallFamily(
        tokenizers.smolvlm, smolvlm, ("SmolVLMProcessor", {"image_seq_len": 4}), ("SmolVLMImageProcessorPil", CROPS)
    ),
    "Mistral 3": SmallFamily(
        tokenizers.mistral3,
        mistral3,
        ("PixtralProcessor", {"patch_size": 14, "spatial_merge_size": 2}),
        ("PixtralImageProcessorPil", {"patch_size": 14, "size": {"longest_edge": 112}}),
    ),
    "Llama-3.2-Vision": SmallFamily(
        tokenizers.mllama,
        mllama,
        ("MllamaProcessor", {}),
        ("MllamaImageProcessorPil", {"size": SQUARE, "max_image_tiles": 4}),
        layers=(0, 2),
    ),
}
