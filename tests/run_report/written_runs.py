"""Folders of runs, written by hand in the schema of the callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


def measurement(step: int, *, vas: float = 2.0, accuracy: float | None = 0.5, depth: int = 2, **changed: Any) -> dict:
    """What VASCallback writes of one validation: VAS of user tokens is `vas`, that of responses twice it."""
    metrics = {"val/vas": vas, "val/vas_ratio_of_means_response": 2 * vas}
    metrics |= {} if accuracy is None else {"val/accuracy": accuracy}

    def of(score: float) -> dict[str, Any]:
        part = score / (1 + score)
        shares = {"image": 0.5 * part, "system": 0.5 * (1 - part), "user": 0.3, "response": 0.1}
        return {
            "num_scored": 1,
            "mean_of_ratios": score,
            "ratio_of_means": score,
            "share": part,
            "median": score,
            "map": [[score + layer, score] for layer in range(depth)],
            "attention_shares": {role: [share] * depth for role, share in shares.items()},
        }

    return {
        "step": step,
        "epoch": 0,
        "baseline": step == 0,
        "model": "tiny",
        "reduction": "mean_of_ratios",
        "num_samples": 1,
        "metrics": metrics,
        "layers": list(range(depth)),
        "user": of(vas),
        "response": of(2 * vas),
        "samples": [{"id": "a", "user": {"share": 0.5}, "response": {"share": 0.5}}],
        "overlays": [{"id": "a", "grid": [[1.0, 2.0], [3.0, 4.0]]}],
        **changed,
    }


def write_measurements(folder: Path, *measured: dict, image: str | None = "red") -> Path:
    """The files of VASCallback; the image under `overlays` has this colour."""
    (folder / "vas").mkdir(parents=True, exist_ok=True)
    for one in measured:
        text = json.dumps(one, indent=1).replace("NaN", "null")
        (folder / "vas" / f"step_{one['step']:08d}.json").write_text(text)
    if image:
        Image.new("RGB", (4, 4), image).save(folder / "vas/overlay_0.png")
    return folder


def write_events(folder: Path, scalars: dict[str, list[float]], images: int = 0) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)
        for step in range(images):
            writer.add_image("vas/map_user", np.zeros((2, 2, 3), np.uint8), step, dataformats="HWC")
    (path,) = folder.glob("events.out.tfevents.*")
    return path
