"""Attention goes back to the place of the image that it belongs to, or an error says why it cannot."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from avar_lightning.callbacks.overlay import LONGEST_EDGE, OverlayError, lay_on_image
from avar_lightning.roles import Role

VISION = SimpleNamespace(spatial_merge_size=2, patch_size=14)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture whose patches all differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST)


def roles_of(*num_image_tokens: int) -> torch.Tensor:
    """One row a sample: a system token, the image tokens, two response tokens, padding."""
    length = 3 + max(num_image_tokens)
    rows = [
        [Role.SYSTEM] + [Role.IMAGE] * count + [Role.RESPONSE] * 2 + [Role.OTHER] * (length - 3 - count)
        for count in num_image_tokens
    ]
    return torch.tensor(rows, dtype=torch.long)


def test_own_image_is_kept_and_attention_fills_its_token_grid() -> None:
    roles = roles_of(6, 2)
    batch = {"images": [[picture(84, 56)], []], "image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 4]])}
    received = torch.arange(float(roles.shape[1]))
    pixels, grid = lay_on_image(received, batch, roles, 0, vision_config=VISION)
    np.testing.assert_array_equal(pixels, np.asarray(picture(84, 56)))
    np.testing.assert_array_equal(grid, [[1, 2, 3], [4, 5, 6]])


def test_image_is_rebuilt_from_qwen_patches() -> None:
    images = [picture(56, 56, 1), picture(84, 56, 2), picture(56, 112, 3)]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 200 * 200})
    batch: dict[str, Any] = dict(processor(images, return_tensors="pt"))
    # The first sample has two images, so the second sample's is the third.
    roles = roles_of(4 + 6, 8)
    received = torch.rand(roles.shape[1])
    for index, expected in ((0, images[0]), (1, images[2])):
        pixels, grid = lay_on_image(received, batch, roles, index, vision_config=VISION, image_processor=processor)
        np.testing.assert_allclose(pixels, np.asarray(expected), atol=1)
        assert grid.shape == (expected.height // 28, expected.width // 28)


def test_pixels_without_a_processor_are_stretched_to_the_full_range() -> None:
    values = torch.linspace(-3, 5, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    pixels, grid = lay_on_image(torch.ones(7), {"pixel_values": values}, roles_of(4, 4), 1)
    assert (pixels.min(), pixels.max(), pixels.shape) == (0, 255, (8, 8, 3))
    assert grid.shape == (2, 2)


def test_large_images_are_shrunk_with_their_proportions() -> None:
    batch = {"images": [picture(2240, 1120)]}
    pixels, _ = lay_on_image(torch.ones(7), batch, roles_of(4), 0)
    assert pixels.shape == (LONGEST_EDGE // 2, LONGEST_EDGE, 3)


@pytest.mark.parametrize(
    ("batch", "num_tokens", "message"),
    [
        ({}, 0, "no image"),
        ({"images": [picture(28, 28)]}, 6, "6 tokens of 1 image\\(s\\) are no square"),
        ({}, 4, "neither `images` nor a tensor `pixel_values`"),
        ({"pixel_values": torch.ones(1, 2, 3, 8, 8)}, 4, r"shape \(1, 2, 3, 8, 8\) cannot be told apart"),
        ({"image_grid_thw": torch.tensor([[1, 2, 2]])[:0]}, 4, "does not match the image tokens"),
        ({"image_grid_thw": torch.tensor([[2, 4, 4]])}, 8, "a video of 2 steps"),
    ],
)
def test_what_cannot_be_laid_on_an_image_says_why(batch: dict[str, Any], num_tokens: int, message: str) -> None:
    roles = roles_of(num_tokens)
    with pytest.raises(OverlayError, match=message):
        lay_on_image(torch.ones(roles.shape[1]), batch, roles, 0, vision_config=VISION)


def test_silent_response_and_unknown_merge_say_why() -> None:
    with pytest.raises(OverlayError, match="no response that attends"):
        lay_on_image(torch.zeros(7), {"images": [picture(28, 28)]}, roles_of(4), 0)
    with pytest.raises(OverlayError, match="no spatial_merge_size"):
        lay_on_image(torch.ones(7), {"image_grid_thw": torch.tensor([[1, 4, 4]])}, roles_of(4), 0)
