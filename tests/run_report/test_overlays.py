"""Attention is laid on the image that it belongs to, or a sentence says why not."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avar_lightning.run_report import overlays
from avar_lightning.run_report.overlays import overlays_part
from avar_lightning.run_report.runs import open_run
from tests.run_report.written_runs import measurement, write_measurements


def overlay(identifier: str | None, value: float) -> dict:
    return {"id": identifier, "grid": [[value, 1.0]]}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], float]]:
    """Colour of the image and first value of the grid of each picture, which is not drawn."""
    found = []

    def plot(image: Image.Image, grid: np.ndarray) -> bytes:
        found.append((image.getpixel((0, 0)), grid[0, 0]))
        buffer = io.BytesIO()
        Image.new("RGB", (1, 1)).save(buffer, format="PNG")
        return buffer.getvalue()

    monkeypatch.setattr(overlays, "plot_overlay", plot)
    return found


def write(folder: Path, first: list[dict], last: list[dict], colours: list[tuple[int, ...]]) -> Path:
    write_measurements(folder, measurement(0, overlays=first), measurement(9, overlays=last), image=None)
    for number, colour in enumerate(colours):
        Image.new("RGB", (2, 2), colour).save(folder / f"vas/overlay_{number}.png")
    return folder / "vas"


def test_each_image_gets_its_own_grids_in_the_order_of_their_numbers(tmp_path: Path, drawn: list) -> None:
    """Twelve of them, so that overlay_10 would come before overlay_2 as a word; the folder vas/ is enough."""
    samples = [overlay(f"s{n}", n) for n in range(12)], [overlay(f"s{n}", 100 + n) for n in range(12)]
    part = overlays_part(open_run(write(tmp_path, *samples, [(n, 0, 0) for n in range(12)])), most=11)
    assert drawn == [pair for n in range(11) for pair in (((n, 0, 0), n), ((n, 0, 0), 100 + n))]
    assert [picture.name for picture in part.pictures[-2:]] == ["overlay_10_step_0", "overlay_10_step_9"]
    assert "before training" in part.pictures[0].caption
    assert part.notes == []


def test_an_image_gets_no_grid_of_another_sample(tmp_path: Path, drawn: list) -> None:
    first, last = [overlay("b", 1), overlay(None, 2), overlay("c", 3)], [overlay("a", 11), overlay(None, 12)]
    overlays_part(open_run(write(tmp_path, first, last, [(1, 0, 0), (2, 0, 0)])), most=4)
    assert drawn == [((1, 0, 0), 11), ((2, 0, 0), 12)], "of the last measurement, whose images they are"


def test_what_is_missing_is_a_sentence(tmp_path: Path, drawn: list) -> None:
    folder = write(tmp_path, [overlay("a", 1)], [overlay("a", 2), overlay("b", 2)], [(1, 0, 0)])
    assert overlays_part(open_run(folder), most=0).notes == ["Left out, as asked."]
    (folder / "overlay_0.png").write_bytes(b"no image")
    assert overlays_part(open_run(folder), most=2).notes == [
        f"There is no image vas/overlay_{number}.png, or it cannot be read." for number in range(2)
    ]
    last = folder / "step_00000009.json"
    last.write_text(last.read_text()[:-3])
    assert "the overlays of step_00000009.json cannot be read" in overlays_part(open_run(folder), most=2).notes[0]
    assert drawn == []
