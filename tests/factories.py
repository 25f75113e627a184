"""Tiny random models of real transformers classes, and batches made by hand: built here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from avar_lightning.roles import Role

IMAGE_TOKEN, VISION_START, VISION_END, PAD = 60, 61, 62, 0
GRID = (1, 4, 4)  # patches of one image; merged 2×2 they are 4 tokens
TOKENS_PER_IMAGE = 4
PATCH_DIM = 3 * 2 * 14 * 14


def tiny_vlm(attn: str = "sdpa", *, dtype: torch.dtype = torch.float32, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A Qwen2.5-VL of 2 text layers (4 heads of 8, 2 key heads) and 1 vision block, in eval mode."""
    torch.manual_seed(seed)
    text_config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        # Large weights: with the default spread all attention is uniform, and nothing would be tested.
        "initializer_range": 0.3,
    } | text
    vision_config = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": text_config["hidden_size"],
        "fullatt_block_indexes": [0],
        "initializer_range": 0.3,
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    config._attn_implementation = attn
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    model.generation_config.pad_token_id = PAD
    return model.eval()


@dataclass
class Conversation:
    """Lengths of one sample: system, user text before and after `images` images, response."""

    system: int = 3
    before: int = 2
    images: int = 1
    after: int = 3
    response: int = 4

    def encode(self, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Token ids and roles, unpadded."""

        def text(count: int) -> list[int]:
            return torch.randint(3, 59, (count,), generator=generator).tolist()

        image = [VISION_START, *[IMAGE_TOKEN] * TOKENS_PER_IMAGE, VISION_END]
        image_roles = [Role.USER, *[Role.IMAGE] * TOKENS_PER_IMAGE, Role.USER]
        ids = text(self.system) + text(self.before) + image * self.images + text(self.after) + text(self.response)
        roles = [Role.SYSTEM] * self.system + [Role.USER] * self.before + image_roles * self.images
        roles += [Role.USER] * self.after + [Role.RESPONSE] * self.response
        return ids, [int(role) for role in roles]


@dataclass
class Batch:
    """What a model's forward takes, and the roles that go with it."""

    inputs: dict[str, Tensor]
    role_ids: Tensor
    lengths: list[int] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with its pictures in another dtype."""
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs.items()}
        return Batch(inputs, self.role_ids, self.lengths)


def make_batch(*conversations: Conversation, padding_side: str = "right", seed: int = 0) -> Batch:
    """Batch of conversations with random tokens and pictures, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    encoded = [conversation.encode(generator) for conversation in conversations or (Conversation(),)]
    length = max(len(ids) for ids, _ in encoded)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        spare = [[value] * (length - len(row)) for row in rows]
        return torch.tensor([r + s if padding_side == "right" else s + r for r, s in zip(rows, spare, strict=True)])

    ids = padded([ids for ids, _ in encoded], PAD)
    inputs = {
        "input_ids": ids,
        "attention_mask": padded([[1] * len(ids) for ids, _ in encoded], 0),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }
    num_images = sum(conversation.images for conversation in conversations or (Conversation(),))
    if num_images:
        num_patches = num_images * GRID[0] * GRID[1] * GRID[2]
        inputs["pixel_values"] = torch.randn(num_patches, PATCH_DIM, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([GRID] * num_images)
    return Batch(inputs, padded([roles for _, roles in encoded], int(Role.OTHER)), [len(ids) for ids, _ in encoded])


class StopAfter(L.Callback):
    """Ends a training after some updates, as an interruption would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps
