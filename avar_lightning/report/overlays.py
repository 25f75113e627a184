"""Attention on images: as VASCallback drew it, or laid again on the images of the run's validation shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avar_lightning.report.attention import plot_overlay
from avar_lightning.report.page import Part, Picture, picture
from avar_lightning.report.runs import Run, read_overlays

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_SEARCHED = 5000
"""Samples whose ids are read; VASCallback lays attention on the first of a validation."""


class NoImagesError(ValueError):
    """The images of a run cannot be found; the message says why."""


def overlay_part(run: Run, prefix: str, *, most: int) -> Part:
    """Attention of the response on the first images, of the first and the last measurement.

    Args:
        run: The run.
        prefix: Of the pictures' names.
        most: Samples that are shown.
    """
    part = Part("Attention on images")
    if most and run.events.overlays:
        part.pictures = _drawn(run, prefix, most)
        return part
    if not most:
        part.notes.append("Left out, as asked.")
        return part
    try:
        part.pictures = list(_laid_again(run, prefix, most))
    except NoImagesError as error:
        part.notes.append(f"No attention is shown on images, since {error}.")
    return part


def _drawn(run: Run, prefix: str, most: int) -> list[Picture]:
    return [
        Picture(
            f"{prefix}{tag.rpartition('/')[2]}_step_{step}",
            png,
            alt=f"An image, and the attention of the response on it, at step {step}.",
            caption=f"Attention of the response at step {step}, as VASCallback drew it ({tag} of the event files).",
        )
        for tag in sorted(run.events.overlays)[:most]
        for step, png in run.events.overlays[tag]
    ]


def _laid_again(run: Run, prefix: str, most: int) -> Sequence[Picture]:
    grids = []
    for measured in run.first_and_last:
        try:
            grids.append((measured, read_overlays(measured)))
        except (KeyError, TypeError, ValueError) as error:
            raise NoImagesError(f"the overlays of {measured.path.name} cannot be read ({error})") from error
    wanted = list(grids[-1][1])[:most]
    if not wanted:
        raise NoImagesError(f"{grids[-1][0].path.name} has no overlay of a sample with an id")
    images = find_images(run.config, wanted)
    pictures = []
    for number, identifier in enumerate(wanted):
        for measured, overlays in grids:
            if identifier in overlays:
                figure = plot_overlay(images[identifier], overlays[identifier])
                told = f"the response to {identifier} at step {measured.step}"
                name = f"{prefix}overlay_{number}_step_{measured.step}"
                caption = f"Attention of {told}, from {measured.path.name} and the run's validation shards."
                alt = f"An image, and the attention of {told} on it."
                pictures.append(picture(name, figure, alt=alt, caption=caption))
    return pictures


def find_images(config: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Image]:
    """The first image of each sample with one of these ids, from local validation shards of ShardDataModule.

    Raises:
        NoImagesError: The configuration names no such shards, or they do not hold the samples.
    """
    data = config.get("data")
    data = data if isinstance(data, dict) else {}
    kind = str(data.get("class_path", "ShardDataModule")).rpartition(".")[2]
    arguments = data.get("init_args", data)
    spec = arguments.get("val") if isinstance(arguments, dict) else None
    if kind != "ShardDataModule" or not spec:
        # A demo world of another version has other pictures under the same ids.
        raise NoImagesError("the event files have no picture of it and config.yaml names no validation shards")
    from avar_lightning.data import SampleError, expand_urls, parse_sample
    from avar_lightning.data.tars import LocalShard

    found: dict[str, Image] = {}
    searched = 0
    try:
        for url in expand_urls(spec):
            shard = LocalShard(url)
            for number, (key, files) in enumerate(shard.index.samples):
                searched += 1
                if searched > MOST_SEARCHED or len(found) == len(wanted):
                    break
                about = json.loads(shard.bytes_of(*files["json"])) if "json" in files else {}
                identifier = str(about.get("id") or key)
                if identifier in wanted and identifier not in found:
                    raw = shard.read(number)
                    if isinstance(raw, dict) and (images := parse_sample(raw).images):
                        found[identifier] = images[0]
    except (OSError, SampleError, ValueError) as error:
        raise NoImagesError(f"the validation shards {spec} cannot be read ({error})") from error
    if missing := [identifier for identifier in wanted if identifier not in found]:
        raise NoImagesError(f"the validation shards {spec} hold no sample {missing[0]!r} with an image")
    return found
