"""How long samples are and how many: measured on the first of the data where it is at hand, otherwise assumed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from avar_lightning.data import DemoDataModule, ShardDataModule
from avar_lightning.data.collate import SampleEncoder
from avar_lightning.data.demo import demo_samples
from avar_lightning.data.sample import SampleError, parse_sample
from avar_lightning.data.shards import find_shards, is_remote
from avar_lightning.data.tars import read_shard
from avar_lightning.doctor.plan import Lengths
from avar_lightning.doctor.shape import Shape
from avar_lightning.roles import Role

MEASURED = 32
"""Samples that are encoded to learn their lengths."""
ASSUMED_LENGTH, ASSUMED_IMAGE_TOKENS, ASSUMED_RESPONSES = 2048, 1280, 0.3


@dataclass(frozen=True)
class Given:
    """What was said on the command line about hardware and data, None where nothing was.

    Attributes:
        devices: A node.
        num_nodes: Nodes.
        length: Tokens of the longest sample (GRPO: prompt).
        mean_length: Tokens of the mean one.
        image_tokens: Image tokens of a sample.
        samples: Training samples.
    """

    devices: int | None = None
    num_nodes: int | None = None
    length: int | None = None
    mean_length: int | None = None
    image_tokens: int | None = None
    samples: int | None = None


def lengths_of(data_class: Any, options: dict[str, Any], shape: Shape, given: Given, *, is_prompt: bool) -> Lengths:
    """Lengths of training samples (GRPO: prompts): said, else measured, else assumed.

    Args:
        data_class: The data module's class, None without one.
        options: Its arguments.
        shape: Of the model.
        given: What was said.
        is_prompt: Whether responses are left out.
    """
    reason = "nothing is known of the data"
    if data_class is not None and issubclass(data_class, ShardDataModule) and given.length is None:
        try:
            return _measured(data_class(**options), is_prompt=is_prompt)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160].rstrip(".")
    bound = options.get("max_length")
    longest = given.length or bound or ASSUMED_LENGTH
    images = given.image_tokens if given.image_tokens is not None else _image_tokens(shape, options.get("max_pixels"))
    images = min(images, longest - 1)
    mean = given.mean_length or longest
    said = "as said" if given.length else "max_length" if bound else "assumed"
    source = f"longest {said}" + (", mean as said" if given.mean_length else ", every sample taken as long")
    if not given.length:
        source += f" ({reason})"
    responses = 0.0 if is_prompt else ASSUMED_RESPONSES
    return Lengths(longest, mean, images, min(images, mean * images / longest), responses, source)


def num_samples(data_class: Any, options: dict[str, Any]) -> int | None:
    """Training samples, where a manifest or local shards say."""
    if data_class is None or not issubclass(data_class, ShardDataModule):
        return None
    if issubclass(data_class, DemoDataModule):
        return int(options.get("num_train") or 0) or None
    try:
        counts = [shard.samples for shard in find_shards(options["train"])] if options.get("train") else [None]
    except (OSError, ValueError):
        return None
    return None if None in counts else sum(count or 0 for count in counts)


def _measured(data: ShardDataModule, *, is_prompt: bool) -> Lengths:
    if data.specs["train"] is None:
        raise ValueError("no training shards are named")
    encode = SampleEncoder(data.processor, max_length=data.max_length, prompt_only=is_prompt)
    encoded = []
    for sample in islice(_samples(data), MEASURED):
        try:
            encoded.append(encode(sample))
        except ValueError:  # a sample that training would leave out as well
            continue
    if not encoded:
        raise ValueError(f"none of the first {MEASURED} samples can be used")
    lengths = [len(sample) for sample in encoded]
    images = [int((sample.tensors["role_ids"] == Role.IMAGE).sum()) for sample in encoded]
    responses = sum(int((sample.tensors["labels"] != -100).sum()) for sample in encoded)
    source = f"measured on {len(encoded)} samples"
    mean = sum(lengths) / len(lengths)
    return Lengths(max(lengths), mean, max(images), sum(images) / len(images), responses / sum(lengths), source)


def _samples(data: ShardDataModule) -> Any:
    spec = data.specs["train"]
    if isinstance(data, DemoDataModule) and not data.train_folder.exists():
        style: Any = data.style if data.style not in ("see", "read") else "direct"
        yield from demo_samples(
            MEASURED, style=style, hint_rate=data.train_hint_rate, seed=data.world_seed, split="train"
        )
        return
    assert spec is not None
    for shard in find_shards(spec, count=False):
        if is_remote(shard.url):
            raise ValueError(f"{shard.url} is not on this machine")
        for raw in read_shard(shard.url):
            if isinstance(raw, SampleError):
                continue
            try:
                yield parse_sample(raw)
            except SampleError:
                continue


def _image_tokens(shape: Shape, max_pixels: int | None) -> int:
    vision = shape.vision
    if vision.tokens_per_image is not None:
        return vision.tokens_per_image
    return max_pixels // vision.pixels_per_token if max_pixels else ASSUMED_IMAGE_TOKENS
