"""What is asked about: questions with images and gold answers, from shards, a JSONL file or the demo world.

Nothing is lost on the way: what cannot be used comes out as an item that says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from avar_lightning.data import Sample, SampleError, ShardCache, find_shards, parse_sample, read_shard
from avar_lightning.data.demo import demo_samples
from avar_lightning.synthesis.config import DEMO, SynthesisConfig

JSONL = ".jsonl"


@dataclass
class Item:
    """One question, or why there is none.

    Attributes:
        where: File and line, or shard and key.
        sample: Prompt turns only, with images, answer and columns; None where it cannot be read.
        question: The user's text, options included.
        problem: Why it cannot be asked.
        prints: Fingerprints of the images' pixels.
    """

    where: str
    sample: Sample | None = None
    question: str = ""
    problem: str | None = None
    prints: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The sample's name; its place where it has none."""
        return self.sample.id if self.sample is not None else self.where

    @property
    def options(self) -> Any:
        """Of multiple choice, if it is one."""
        return self.sample.columns.get("options") if self.sample is not None else None

    @property
    def asked(self) -> bytes:
        """The same for the same images and question."""
        return hashlib.sha256("\0".join([self.question, *self.prints]).encode()).digest()[:16]


def read_items(config: SynthesisConfig) -> Iterator[Item]:
    """All questions in their order, one at a time.

    Raises:
        FileNotFoundError: The input is not there.
    """
    if config.input == DEMO:
        demo = config.demo
        samples = demo_samples(
            demo.num_samples, style="anchored", hint_rate=demo.hint_rate, seed=demo.seed, split=demo.split
        )
        items: Iterator[Item] = (_item(sample, sample.id, config) for sample in samples)
    elif config.input.endswith(JSONL):
        items = _items_of_jsonl(_existing(config.input), config)
    else:
        items = _items_of_shards(config)
    return islice(items, config.limit)


def count_items(config: SynthesisConfig) -> int | None:
    """How many there are; None where that is only known at the end."""
    if config.input == DEMO:
        count: int | None = config.demo.num_samples
    elif config.input.endswith(JSONL):
        with _existing(config.input).open("rb") as file:
            count = sum(bool(line.strip()) for line in file)
    else:
        counts = [shard.samples for shard in find_shards(config.input)]
        count = None if None in counts else sum(number or 0 for number in counts)
    return count if config.limit is None or count is None else min(count, config.limit)


def _items_of_shards(config: SynthesisConfig) -> Iterator[Item]:
    cache = ShardCache()
    for shard in find_shards(config.input):
        try:
            raws = read_shard(cache.path(shard), shard.samples)
        except OSError as error:
            raise FileNotFoundError(f"{shard.url} cannot be read ({error}); check the path and the network.") from error
        for number, raw in enumerate(raws):
            where = f"{shard.url}: sample {number}"
            if isinstance(raw, SampleError):
                yield Item(where, problem=str(raw))
                continue
            where = f"{shard.url}: sample {raw['__key__']!r}"
            try:
                yield _item(parse_sample({**raw, "__url__": shard.url}), where, config)
            except SampleError as error:
                yield Item(where, problem=str(error))


def _items_of_jsonl(path: Path, config: SynthesisConfig) -> Iterator[Item]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            if line.strip():
                try:
                    yield _item(_sample_of_line(line, path, number), where, config)
                except ValueError as error:
                    yield Item(where, problem=f"{where}: {error}")


def _sample_of_line(line: bytes, path: Path, number: int) -> Sample:
    """The sample of one JSON line, with its images as `parse_sample` decodes them."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error}); expected one object a line") from error
    question = row.pop("question", None) if isinstance(row, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question is {question!r}; expected an object with a text there")
    images = row.pop("image", None) or row.pop("images", None) or []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"image is {names!r}; expected a path relative to the file, or a list of these")
    parts: list[dict[str, str]] = [{"type": "image"} for _ in names]
    text = with_options(question.strip(), row.get("options"))
    row["messages"] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    raw: dict[str, Any] = {"__key__": f"{path.stem}-{number:08d}", "__url__": path.name}
    raw["json"] = json.dumps(row).encode()
    raw |= {f"{index}.png": _bytes_of(name, path.parent) for index, name in enumerate(names)}
    return parse_sample(raw)


def _bytes_of(name: str, folder: Path) -> bytes:
    """An image file's content, of this folder and no other."""
    inside = folder.resolve()
    path = (inside / name).resolve()
    if not path.is_relative_to(inside):
        raise ValueError(f"the image {name!r} lies outside of {folder}; expected a path inside the JSONL's folder")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the image {name!r} cannot be read ({error.strerror}); expected a file there") from error


def _item(sample: Sample, where: str, config: SynthesisConfig) -> Item:
    """A question of a sample's prompt; its response, if it has one, is dropped."""
    messages = list(sample.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    texts = [text_of(message["content"]) for message in messages if message["role"] == "user"]
    question = "\n".join(filter(None, texts))
    problem = None
    if any(message["role"] == "assistant" for message in messages):
        problem = "it has several turns; expected one question"
    elif not sample.images:
        problem = "it has no image"
    elif sample.answer is None or sample.answer == "":
        problem = "it has no gold answer"
    elif not question:
        problem = "its question is empty"
    elif not _is_unicode([messages, sample.fields()]):
        problem = "it holds half of a character (a lone surrogate), which no file can; expected whole ones"
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    prompt = replace(sample, messages=messages, columns=dict(sample.columns), key="")
    return Item(where, prompt, question, problem, [fingerprint(image) for image in sample.images])


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Text of a message, without its images.

    >>> text_of([{"type": "image"}, {"type": "text", "text": "How many?"}])
    'How many?'
    """
    return (content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)).strip()


def options_text(options: Any) -> str:
    """Options of multiple choice, one a line.

    >>> options_text(["a cat", "a dog"])
    '(A) a cat\\n(B) a dog'
    """
    return "\n".join(f"({letter}) {text}" for letter, text in _lettered(options))


def with_options(question: str, options: Any) -> str:
    """A question that shows its options, which many already do.

    >>> with_options("Which? A. cat B. dog", ["cat", "dog"])
    'Which? A. cat B. dog'
    """
    missing = [text for _, text in _lettered(options) if text not in question]
    return f"{question}\n{options_text(options)}" if missing else question


def _lettered(options: Any) -> list[tuple[str, str]]:
    if isinstance(options, Mapping):
        pairs = [(str(letter), text) for letter, text in options.items()]
    else:
        pairs = list(zip(ascii_uppercase, options)) if isinstance(options, list | tuple) else []
    return [(letter, str(text)) for letter, text in pairs if text is not None]


def fingerprint(image: Image.Image) -> str:
    """The same for the same pixels, however they are stored."""
    head = f"{image.mode} {image.size}".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:32]


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {name}; expected a .jsonl with question, image and answer: check the path.")
    return path
