"""Conversations that a family has to get through: pictures of several sizes, two at once, none at all."""

from __future__ import annotations

import numpy as np
from PIL import Image

from avar_lightning.data import Sample

SYSTEM = "Look at the picture, then answer in one word."
QUESTION = "Which shape is this?"
ANSWER = "A red circle."


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def sample(*sizes: tuple[int, int], question: str = QUESTION, answer: str = ANSWER, key: str = "one") -> Sample:
    """A question about pictures of these widths and heights, and its answer."""
    shown = [{"type": "image"} for _ in sizes]
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    images = [picture(*size, seed=index) for index, size in enumerate(sizes)]
    return Sample(messages, images, answer=answer, id=key, key=key, shard="made")


def dialogue() -> Sample:
    """Two turns, the second with a picture of its own behind its text."""
    first = sample((60, 40))
    messages = [
        *first.messages,
        {"role": "user", "content": [{"type": "text", "text": "And which colour has this?"}, {"type": "image"}]},
        {"role": "assistant", "content": "Blue."},
    ]
    return Sample(messages, [*first.images, picture(30, 50, seed=5)], id="dialogue", key="dialogue", shard="made")


KINDS = {
    "one": sample((70, 40)),
    "other": sample((30, 60), question="What colour has it?", answer="It is a blue square. Look again.", key="other"),
    "two": sample((56, 28), (40, 90), question="Are the first and the second picture a circle?", key="two"),
    "text": sample(question="Is a square a shape?", answer="No.", key="text"),
    "dialogue": dialogue(),
}
