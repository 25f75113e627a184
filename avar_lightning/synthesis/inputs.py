"""What is asked about: questions with images and gold answers, from shards, a JSONL file or the demo world.

Nothing is lost on the way: what cannot be used comes out as an item that says why.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from avar_lightning.conversion.formats import lettered
from avar_lightning.conversion.images import ImageFolder
from avar_lightning.conversion.rejecting import BadRecord, short
from avar_lightning.conversion.textfiles import JsonFiles
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
        path = _existing(config.input)
        count = sum(1 for _ in JsonFiles([path], path.parent).addresses())
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
    records, images = JsonFiles([path], path.parent), ImageFolder(path.parent)
    for place, record in records.read(records.addresses()):
        where = Path(place).name
        try:
            if isinstance(record, BadRecord):
                raise record
            yield _item(_sample_of_record(record, where, images), where, config)
        except ValueError as error:
            yield Item(where, problem=f"{where}: {error}")


def _sample_of_record(row: dict[str, Any], where: str, folder: ImageFolder) -> Sample:
    """The sample of one record, with its images as `parse_sample` decodes them."""
    question = row.pop("question", None)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question is {short(question)}; expected a text")
    images = row.pop("image", None) or row.pop("images", None) or []
    references = images if isinstance(images, list) else [images]
    parts: list[dict[str, str]] = [{"type": "image"} for _ in references]
    text = with_options(question.strip(), row.get("options"))
    row["messages"] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    name, _, line = where.rpartition(":")
    raw: dict[str, Any] = {"__key__": f"{Path(name).stem}-{int(line):08d}", "__url__": name}
    raw["json"] = json.dumps(row).encode()
    for index, reference in enumerate(references):
        suffix, raw_image = _load_image(reference, folder)
        raw[f"{index}.{suffix}"] = raw_image
    return parse_sample(raw)


def _load_image(reference: Any, folder: ImageFolder) -> tuple[str, bytes]:
    try:
        return folder.load(reference)
    except BadRecord as error:  # without the option of `avar convert` that it names
        raise ValueError(error.reason.partition(" (--images ")[0]) from error


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
    """Options of multiple choice, one a line, as `avar convert` writes them.

    >>> options_text(["a cat", "a dog"])
    'A. a cat\\nB. a dog'
    """
    return "\n".join(lettered(_by_letter(options)))


def with_options(question: str, options: Any) -> str:
    """A question that shows its options with their letters, which many already do.

    >>> with_options("Which? (A) cat (B) dog", ["cat", "dog"])
    'Which? (A) cat (B) dog'
    >>> with_options("Are there 1 or 2?", ["1", "2"])
    'Are there 1 or 2?\\nA. 1\\nB. 2'
    """
    shown = all(_shows(question, letter, text) for letter, text in _by_letter(options).items())
    return question if shown else f"{question}\n{options_text(options)}"


def _shows(question: str, letter: str, text: str) -> bool:
    text = re.sub(rf"^\(?{re.escape(letter)}[.):]\s*", "", text)  # some options bring their letters along
    return re.search(rf"(?<!\w)\(?{re.escape(letter)}[.):]\s*{re.escape(text)}(?!\w)", question) is not None


def _by_letter(options: Any) -> dict[str, str]:
    if isinstance(options, Mapping):
        pairs = [(str(letter), text) for letter, text in options.items()]
    else:
        pairs = list(zip(ascii_uppercase, options)) if isinstance(options, list | tuple) else []
    return {letter: str(text) for letter, text in pairs if text is not None}


def fingerprint(image: Image.Image) -> str:
    """The same for the same pixels, however they are stored."""
    head = f"{image.mode} {image.size}".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:32]


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {name}; expected a .jsonl with question, image and answer: check the path.")
    return path
