"""A real processor, made once, and small samples and shards to read."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import ProcessorMixin

from avar_lightning.data.demo_base import build_processor
from avar_lightning.data.sample import Sample
from avar_lightning.data.writer import write_shards

Files = dict[str, bytes]


@pytest.fixture(scope="session")
def processor() -> ProcessorMixin:
    return build_processor()


def make_sample(index: int = 0, *, images: int = 1, words: int = 3, answered: bool = True) -> Sample:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": f"Which cell, number {index}?"}]
    messages = [{"role": "user", "content": parts}]
    if answered:
        messages.append({"role": "assistant", "content": " ".join(["red"] * words)})
    pictures = [Image.new("RGB", (84, 84), (index % 256, 10 * number, 0)) for number in range(images)]
    return Sample(messages=messages, images=pictures, answer="red", id=f"s{index}", columns={"index": index})


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Write `count` samples into shards of `size`; `words(index)` is the length of an answer."""

    def write(count: int, size: int = 1000, *, words: Callable[[int], int] = lambda _: 3, name: str = "shards") -> str:
        samples = [make_sample(index, words=words(index)) for index in range(count)]
        write_shards(samples, tmp_path / name, samples_per_shard=size)
        return str(tmp_path / name)

    return write


def sample_files(sample: Sample) -> Files:
    """The files of one sample by what follows its key, as a foreign tool would write them."""
    files = {"json": json.dumps({"messages": sample.messages, **sample.fields()}).encode()}
    for index, image in enumerate(sample.images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[f"{index}.png"] = buffer.getvalue()
    return files


def write_tar(path: Path, samples: dict[str, Files]) -> Path:
    """A tar without a manifest, written with the standard library alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for name, value in files.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
    return path
