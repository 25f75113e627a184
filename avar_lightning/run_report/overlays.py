"""Attention laid on the images that VASCallback left in `vas/overlay_*.png`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from avar_lightning.report.attention import plot_overlay
from avar_lightning.run_report.measurements import read_grids
from avar_lightning.run_report.page import Part
from avar_lightning.run_report.runs import Run


def overlays_part(run: Run, *, most: int) -> Part:
    """Attention of the response on the images of the last measurement, then and at the first one.

    Args:
        run: A run that was measured.
        most: Samples that are shown.
    """
    part, ends = Part("Attention on images"), run.first_and_last
    try:
        grids = [read_grids(measured) for measured in ends]
    except ValueError as error:
        part.notes.append(f"No attention is shown on images, since {error}.")
        return part
    for number, (identifier, _) in enumerate(grids[-1][:most]):
        path = ends[-1].path.with_name(f"overlay_{number}.png")
        image = read_image(path)
        if image is None:
            part.notes.append(f"There is no image vas/{path.name}, or it cannot be read.")
            continue
        for measured, own in zip(ends, grids, strict=True):
            # The image is that of the last measurement; others may have begun with other samples.
            same = number < len(own) and own[number][0] == identifier is not None
            if same or measured is ends[-1]:
                told = f"the response to {identifier or f'sample {number}'}, {measured.when}"
                figure = plot_overlay(image, own[number][1])
                name = f"overlay_{number}_step_{measured.step}"
                caption = f"Attention of {told}, from {measured.path.name} and {path.name}."
                part.add(name, figure, alt=f"An image, and the attention of {told} on it.", caption=caption)
    if not part.pictures and not part.notes:
        part.notes.append("Left out, as asked." if not most else f"{ends[-1].path.name} has none.")
    return part


def read_image(path: Path) -> Image.Image | None:
    """An image, RGB; None where there is none that can be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
