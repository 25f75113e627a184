"""Lay the attention that image tokens receive back on the image they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avar_lightning.roles import Role

LONGEST_EDGE = 512
"""Pictures are shrunk to this many pixels before they are kept for drawing."""


@dataclass
class Overlay:
    """An image, uint8 (height, width, 3), and the attention that its tokens received (rows, columns)."""

    id: Any
    pixels: NDArray[np.uint8]
    grid: NDArray[np.float64]


class OverlayError(ValueError):
    """A sample's attention cannot be laid on its image; the message says why."""


def lay_on_image(
    received_K: Tensor,
    batch: Mapping[str, Any],
    role_ids: Tensor,
    index: int,
    *,
    vision_config: Any = None,
    image_processor: Any = None,
    square: bool = True,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Find the first image of one sample and arrange the attention on its tokens as they lie on it.

    Args:
        received_K: attention on each key of the sample.
        batch: with `images` (PIL, a list a sample or one a sample) or `pixel_values`, and for the Qwen-VL
            families `image_grid_thw`.
        role_ids: (B, N) roles.
        index: the sample.
        vision_config: of the model; patch size and spatial merge of the Qwen-VL families.
        image_processor: undoes the normalisation of `pixel_values`; without it their range is stretched.
        square: whether an image's tokens are one square in reading order, where there is no `image_grid_thw`.

    Returns:
        Pixels (height, width, 3) and attention (rows, columns).

    Raises:
        OverlayError: the sample has no image, or its pixels or its token grid are unknown.
    """
    tokens = received_K[role_ids[index] == Role.IMAGE].double().cpu().numpy()
    if tokens.size == 0:
        raise OverlayError("it has no image")
    if not tokens.any():
        raise OverlayError("it has no response that attends to the image")
    own = _own_images(batch, index)
    grid_thw = batch.get("image_grid_thw")
    if grid_thw is None and not square:
        raise OverlayError("its tokens are not known to be one square in reading order, and there is no image_grid_thw")
    if grid_thw is not None:
        number, rows, columns = _qwen_grid(grid_thw, role_ids, index, vision_config)
    else:
        number, (rows, columns) = index, _square_grid(tokens.size, len(own) or 1)
    if own:
        pixels = np.asarray(_shrink(own[0].convert("RGB")))
    else:
        pixels = _pixels(batch, number, role_ids.shape[0], vision_config, image_processor)
    return pixels, tokens[: rows * columns].reshape(rows, columns)


def _own_images(batch: Mapping[str, Any], index: int) -> list[Image.Image]:
    images = batch.get("images")
    if not isinstance(images, (list, tuple)) or index >= len(images):
        return []
    own = images[index] if isinstance(images[index], (list, tuple)) else [images[index]]
    return [image for image in own if isinstance(image, Image.Image)]


def _qwen_grid(grid_thw: Tensor, role_ids: Tensor, index: int, vision_config: Any) -> tuple[int, int, int]:
    """Give the number in the batch of the sample's first image, and the rows and columns of its tokens."""
    merge = getattr(vision_config, "spatial_merge_size", None)
    if merge is None:
        raise OverlayError("the model's vision config has no spatial_merge_size to read image_grid_thw with")
    sizes = [t * h * w // merge**2 for t, h, w in grid_thw.tolist()]
    before = int((role_ids[:index] == Role.IMAGE).sum())
    # Images stand in the order of the samples, so the tokens before this sample are those of whole images.
    number, passed = 0, 0
    while passed < before and number < len(sizes):
        passed, number = passed + sizes[number], number + 1
    if passed != before or number == len(sizes):
        raise OverlayError(f"image_grid_thw {grid_thw.tolist()} does not match the image tokens of the batch")
    frames, height, width = grid_thw[number].tolist()
    if frames != 1:
        raise OverlayError(f"it shows a video of {frames} steps, not an image")
    return number, height // merge, width // merge


def _square_grid(num_tokens: int, num_images: int) -> tuple[int, int]:
    side = math.isqrt(num_tokens // num_images)
    if side * side * num_images != num_tokens:
        raise OverlayError(
            f"{num_tokens} tokens of {num_images} image(s) are no square and the batch has no image_grid_thw"
        )
    return side, side


def _pixels(
    batch: Mapping[str, Any], number: int, num_samples: int, vision_config: Any, image_processor: Any
) -> NDArray[np.uint8]:
    """Rebuild an image from what the image processor made of it."""
    values, grid_thw = batch.get("pixel_values"), batch.get("image_grid_thw")
    if not isinstance(values, Tensor):
        raise OverlayError("the batch has neither `images` nor a tensor `pixel_values`")
    if values.ndim == 2 and grid_thw is not None:
        image = _unpatchify(values, grid_thw, number, vision_config)
    elif values.ndim == 4 and values.shape[0] == num_samples:
        image = values[number].permute(1, 2, 0)
    else:
        raise OverlayError(f"pixel_values of shape {tuple(values.shape)} cannot be told apart into images")
    array = image.double().cpu().numpy()
    mean, std = (getattr(image_processor, f"image_{name}", None) for name in ("mean", "std"))
    if mean is not None and std is not None:
        array = array * np.asarray(std) + np.asarray(mean)
    else:
        array = (array - array.min()) / max(float(np.ptp(array)), 1e-12)
    return np.asarray(_shrink(Image.fromarray((255 * array.clip(0, 1)).round().astype(np.uint8))))


def _unpatchify(values: Tensor, grid_thw: Tensor, number: int, vision_config: Any) -> Tensor:
    """Undo Qwen-VL's patches, each (channel, time, patch, patch), in groups of merge × merge."""
    merge, patch = vision_config.spatial_merge_size, vision_config.patch_size
    _, height, width = grid_thw[number].tolist()
    start = int(grid_thw[:number].prod(dim=1).sum())
    patches = values[start : start + height * width]
    patches = patches.reshape(height // merge, width // merge, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
    return patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)


def _shrink(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((LONGEST_EDGE, LONGEST_EDGE))
    return image
