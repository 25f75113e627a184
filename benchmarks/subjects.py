"""What is timed: Qwen2.5-VL's architecture in several sizes with random weights, and batches of any length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from avar_lightning.data.collate import IGNORE
from avar_lightning.roles import Role

IMAGE_TOKEN, WORDS = 5, 256
PATCHES_PER_TOKEN, PATCH_WIDTH = 4, 3 * 2 * 14 * 14


@dataclass(frozen=True)
class Size:
    """Of a text decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


SIZES = {
    "thin": Size(128, 256, 2, 4, 2),  # nearly all attention, once sequences are long
    "small": Size(256, 704, 4, 4, 2),
    "medium": Size(512, 1408, 8, 8, 2),
    "3b": Size(2048, 11008, 36, 16, 2),
    "7b": Size(3584, 18944, 28, 28, 4),
}


def build(
    size: str, *, attention: str, length: int, layers: int | None = None, device: str = "cpu", dtype: str = "float32"
) -> PreTrainedModel:
    """A model under a small vocabulary, with two small vision blocks.

    Args:
        size: Of `SIZES`.
        attention: transformers' name of its attention.
        length: Longest sequence.
        layers: Decoder layers, those of the size when unset.
        device: Where it is.
        dtype: Of its weights.
    """
    torch.manual_seed(0)
    shape = SIZES[size]
    eighth = shape.head_dim // 8  # time, height and width share the rotary dimensions 2 : 3 : 3, as in released models
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": WORDS,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": layers or shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_heads,
            "max_position_embeddings": 2 * length,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN,
    )
    config._attn_implementation = attention
    return Qwen2_5_VLForConditionalGeneration(config).to(device, getattr(torch, dtype))


def make_roles(length: int, device: str = "cpu", *, num_image: int | None = None) -> Tensor:
    """A conversation (1, length): 1/16 system, an image (a quarter when unset), 1/16 question, the rest response."""
    sixteenth = length // 16
    if not sixteenth:
        raise SystemExit(f"{length} tokens are too few for a conversation with an image; choose 16 or more.")
    num_image = 4 * sixteenth if num_image is None else num_image
    if num_image + 2 * sixteenth >= length:
        raise SystemExit(f"an image of {num_image} tokens leaves no response in {length} tokens; choose a smaller one.")
    counts = {Role.SYSTEM: sixteenth, Role.IMAGE: num_image, Role.USER: sixteenth}
    roles = [int(role) for role, count in counts.items() for _ in range(count)]
    return torch.tensor([roles + [int(Role.RESPONSE)] * (length - len(roles))], device=device)


def make_batch(length: int, batch: int = 1) -> dict[str, Any]:
    """A batch as the data module makes it: random words and pictures, labels on responses; a quarter is the image."""
    generator = torch.Generator().manual_seed(0)
    roles = make_roles(length).repeat(batch, 1)
    is_image = roles == Role.IMAGE
    words = torch.randint(IMAGE_TOKEN + 5, WORDS, roles.shape, generator=generator)
    ids = words.masked_fill(is_image, IMAGE_TOKEN)
    patches = int(is_image[0].sum()) * PATCHES_PER_TOKEN
    height = 2 ** (patches.bit_length() // 2)
    if length < 128 or patches % height or height % 2 or patches // height % 2:
        raise SystemExit(f"{length} tokens have no whole picture; choose a power of two from 128 on.")
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(roles != Role.RESPONSE, IGNORE),
        "role_ids": roles,
        "mm_token_type_ids": is_image.long(),
        "pixel_values": torch.randn(batch * patches, PATCH_WIDTH, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, patches // height]] * batch),
    }


class Case(NamedTuple):
    """What is measured."""

    size: str
    layers: int
    length: int
    num_image: int | None

    def build(self, attention: str, *, device: str, dtype: str) -> PreTrainedModel:
        """The model of this case; the arguments are those of `build`."""
        return build(self.size, attention=attention, length=self.length, layers=self.layers, device=device, dtype=dtype)

    @staticmethod
    def of(text: str) -> Case:
        """Read from the command line.

        Raises:
            SystemExit: It is no case.
        """
        size, *numbers = text.split("-")
        if size not in SIZES or len(numbers) not in (2, 3) or not all(map(str.isdigit, numbers)):
            known = ", ".join(SIZES)
            raise SystemExit(f"{text!r} is no case, expected SIZE-LAYERS-LENGTH[-IMAGE] with a size of {known}.")
        layers, length, *image = map(int, numbers)
        if not layers or image == [0]:
            raise SystemExit(f"{text!r} has no layer or no image token; choose more.")
        make_roles(length, num_image=image[0] if image else None)  # which knows what is too short
        return Case(size, layers, length, image[0] if image else None)

    @staticmethod
    def without_image(text: str) -> Case:
        """Read from the command line of a benchmark whose batches hold pictures, a quarter of all tokens.

        Raises:
            SystemExit: It is no such case.
        """
        case = Case.of(text)
        make_batch(case.length)  # which knows what lengths have a picture
        if case.num_image is not None:
            raise SystemExit(f"{text!r} chooses image tokens, expected SIZE-LAYERS-LENGTH; they are a quarter here.")
        return case
