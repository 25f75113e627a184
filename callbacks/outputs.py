"""What a validation measured as pictures, in the loggers that show them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from numpy.typing import NDArray

from avar_lightning.callbacks.measurement import Measurement
from avar_lightning.callbacks.overlay import Overlay
from avar_lightning.report import plot_attention_shares, plot_overlay, plot_vas_map, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figures(loggers: Sequence[Logger], figures: Iterable[tuple[str, Figure]], *, step: int) -> None:
    """Give figures to each logger that takes pictures, by name; without one nothing is drawn."""
    log_pixels(loggers, ((name, render(figure)) for name, figure in figures), step=step)


def log_pixels(loggers: Sequence[Logger], pictures: Iterable[tuple[str, NDArray[np.uint8]]], *, step: int) -> None:
    """Give pictures (height, width, 3) to each logger that takes them, by name; without one none is made.

    Those are TensorBoardLogger and loggers with WandbLogger's `log_image`.
    """
    takers = [item for item in loggers if isinstance(item, TensorBoardLogger) or hasattr(item, "log_image")]
    if not takers:
        return
    for name, pixels in pictures:
        for logger in takers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, pixels, step, dataformats="HWC")
            else:
                logger.log_image(key=name, images=[pixels], step=step)


def vas_figures(measured: Measurement, overlays: Sequence[Overlay]) -> Iterator[tuple[str, Figure]]:
    """Maps, shares and overlays of a validation, each drawn when it is asked for."""
    for query in measured.queries:
        map_LH = measured.maps[query].value()
        if map_LH is not None:
            title = f"VAS of {query} tokens"
            yield f"vas/map_{query}", plot_vas_map(map_LH, layers=measured.layers, title=title)
        if shares := measured.attention_shares(query):
            title = f"Where {query} tokens attend"
            yield f"vas/shares_{query}", plot_attention_shares(shares, layers=measured.layers, title=title)
    for number, overlay in enumerate(overlays):
        title = "Attention of the response" + ("" if overlay.id is None else f" ({overlay.id})")
        yield f"vas/overlay_{number}", plot_overlay(overlay.pixels, overlay.grid, title=title)
