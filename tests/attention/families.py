"""One small random model of each family, with a padded batch that has pictures, and the roles of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from tests.factories import Conversation, make_batch, tiny_vlm

IMAGE = 60
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SLIDING = ["sliding_attention", "full_attention"]
Inputs = dict[str, Tensor]


@dataclass
class Family:
    """A model, made again with the same weights on every call, and what to give it."""

    build: Callable[[], PreTrainedModel]
    make: Callable[[], tuple[Inputs, Tensor]]
    layers: tuple[int, ...] = (0, 1)  # those whose attention is a softmax over tokens
    attn: tuple[str, ...] = ("eager", "sdpa")


def padded_on_the_right(inputs: Inputs, roles: Tensor) -> tuple[Inputs, Tensor]:
    """The same batch with its padding on the other side."""
    sequences = {name for name, x in inputs.items() if x.shape[:2] == roles.shape}

    def turn(x: Tensor) -> Tensor:
        spare = (inputs["attention_mask"] == 0).sum(1).tolist()
        return torch.stack([row.roll(-count, 0) for row, count in zip(x, spare, strict=True)])

    return {name: turn(x) if name in sequences else x for name, x in inputs.items()}, turn(roles)


def tokens(num_image: int) -> tuple[Inputs, Tensor]:
    """Two samples of system, image, user and response tokens, the second padded on the left."""
    length = 9 + num_image
    ids = torch.randint(3, 59, (2, length), generator=torch.Generator().manual_seed(0))
    first = [1] * 3 + [3] * num_image + [2] * 4 + [4] * 2
    second = [0] * 3 + [1] + [3] * num_image + [2] * 3 + [4] * 2
    roles = torch.tensor([first, second])
    ids[roles == 3] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}, roles


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def seeded(make: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        return make().eval()

    return build


def qwen2_5_vl_inputs() -> tuple[Inputs, Tensor]:
    batch = make_batch(Conversation(), Conversation(images=2), padding_side="left")
    return batch.inputs, batch.role_ids


def qwen3_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    no_ids = {name: value for name, value in TEXT.items() if not name.endswith("token_id")}
    text = no_ids | {"head_dim": 8, "rope_parameters": rope, "pad_token_id": 0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "initializer_range": 0.3}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": 61, "vision_end_token_id": 62}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


def qwen3_vl_inputs() -> tuple[Inputs, Tensor]:
    inputs, roles = tokens(4)
    inputs["mm_token_type_ids"] = (roles == 3).long()
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    inputs["pixel_values"] = pixels(2 * 16, 3 * 2 * 16 * 16)
    return inputs, roles


def llava() -> PreTrainedModel:
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    config.vision_feature_layer = -1
    return hf.LlavaForConditionalGeneration(config)


def llava_inputs() -> tuple[Inputs, Tensor]:
    inputs, roles = tokens(4)
    return inputs | {"pixel_values": pixels(2, 3, 28, 28)}, roles


def internvl() -> PreTrainedModel:
    vision = hf.InternVLVisionConfig(**VISION | {"image_size": [28, 28], "patch_size": [14, 14]})
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=1
    )
    return hf.InternVLForConditionalGeneration(config)


def internvl_inputs() -> tuple[Inputs, Tensor]:
    inputs, roles = tokens(1)
    return inputs | {"pixel_values": pixels(2, 3, 28, 28)}, roles


def gemma3() -> PreTrainedModel:
    text = hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, layer_types=SLIDING, query_pre_attn_scalar=8)
    vision = hf.SiglipVisionConfig(**VISION)
    config = hf.Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, image_token_id=IMAGE, mm_tokens_per_image=4
    )
    return hf.Gemma3ForConditionalGeneration(config)


def gemma3_inputs() -> tuple[Inputs, Tensor]:
    inputs, roles = tokens(4)
    # Image tokens see each other in both directions.
    return inputs | {"token_type_ids": (roles == 3).long(), "pixel_values": pixels(2, 3, 28, 28)}, roles


def paligemma2() -> PreTrainedModel:
    text = hf.Gemma2Config(**TEXT, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)
    vision = hf.SiglipVisionConfig(**VISION)
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)
    return hf.PaliGemmaForConditionalGeneration(config)


def paligemma2_inputs() -> tuple[Inputs, Tensor]:
    inputs, roles = tokens(4)
    return inputs | {"token_type_ids": torch.zeros_like(roles), "pixel_values": pixels(2, 3, 28, 28)}, roles


def mllama() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope}
    vision = {name: value for name, value in VISION.items() if name != "num_attention_heads"}
    vision |= {"attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    model = hf.MllamaForConditionalGeneration(hf.MllamaConfig(vision_config=vision, text_config=text))
    for layer in model.get_decoder().layers:  # gates start at 0, and the picture would not be seen
        for name, parameter in layer.named_parameters():
            if name.endswith("gate"):
                torch.nn.init.ones_(parameter)
    return model


def mllama_inputs() -> tuple[Inputs, Tensor]:
    inputs, roles = tokens(1)
    # vocab_size is 64, and the image token lies behind the vocabulary's end in the released model; here it is within.
    return inputs | {
        "pixel_values": pixels(2, 1, 1, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, roles.shape[1], 1, 1, dtype=torch.long),
    }, roles


FAMILIES = {
    "Qwen2.5-VL": Family(tiny_vlm, qwen2_5_vl_inputs),
    "Qwen3-VL": Family(seeded(qwen3_vl), qwen3_vl_inputs),
    "LLaVA": Family(seeded(llava), llava_inputs, attn=("eager", "sdpa", "flex_attention")),
    "InternVL": Family(seeded(internvl), internvl_inputs),
    "Gemma 3": Family(seeded(gemma3), gemma3_inputs),
    "Llama-3.2-Vision": Family(seeded(mllama), mllama_inputs, layers=(0, 2)),
}
SOFTCAPPED = Family(seeded(paligemma2), paligemma2_inputs, attn=("eager",))  # SDPA refuses softcap
