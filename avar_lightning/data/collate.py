"""Samples to tensors to batches.

Legend: N tokens of one sample, B samples, I images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import ProcessorMixin

from avar_lightning.data.sample import Sample, SampleError
from avar_lightning.families import has_row_a_sample, placeholder_texts
from avar_lightning.roles import ChatTemplateError, Role, message_roles
from avar_lightning.roles.template import render

IGNORE = -100  # the label that cross-entropy leaves out
Side = Literal["left", "right"]
FILLER_SIZE = (56, 56)  # of an image that is there for its own sake, in pixels
_PADDING = {"labels": IGNORE, "role_ids": int(Role.OTHER)}  # and 0 for every other key but input_ids


class TooLong(ValueError):
    """A sample with more than ``max_length`` tokens: dropped whole, as a cut could go through image
    tokens."""


@dataclass(frozen=True)
class Encoded:
    """One sample as tensors; its length is its number of tokens.

    Attributes:
        tensors: ``input_ids, attention_mask, labels, role_ids`` (1, N) and what else the processor made.
        prompt: The sequence-shaped part of it for the conversation up to the last response, for generation.
        columns: ``answer``, ``id``, ``source`` and every other JSON field.
        images: The images themselves, when asked for.
        messages: The conversation up to the last response, as the sample has it.
    """

    tensors: dict[str, Tensor]
    prompt: dict[str, Tensor] | None
    columns: dict[str, Any]
    images: list[Image.Image] | None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.tensors["input_ids"].shape[1]

    @property
    def has_image(self) -> bool:
        """Whether there is anything of an image among its tensors."""
        return has_image(self.tensors)

    @property
    def prompt_row(self) -> dict[str, Tensor]:
        """The prompt with its pictures, ready for `Collator.merge`."""
        whole = self.tensors["input_ids"]
        pictures = {name: value for name, value in self.tensors.items() if not is_sequence(value, whole)}
        return pictures | (self.prompt or {})

    def marked_repeated(self) -> "Encoded":
        """The same sample as mere filling: ``"repeated": True`` in its columns, no loss and no role that counts."""
        nothing = {name: torch.full_like(self.tensors[name], value) for name, value in _PADDING.items()}
        return replace(self, tensors={**self.tensors, **nothing}, columns={**self.columns, "repeated": True})


class SampleEncoder:
    """Encode one sample with a model's own chat template, tokenizer and image processor.

    Args:
        processor: The model's processor.
        max_length: Most tokens, image tokens included; longer samples are refused whole.
        with_prompt: For evaluation: add the prompt, and accept samples without a response.
        prompt_only: For reinforcement learning: leave the last response out before anything else.
        keep_images: Keep the images beside the tensors.

    Raises:
        ValueError: When the processor has no image processor.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        max_length: int | None = None,
        with_prompt: bool = False,
        prompt_only: bool = False,
        keep_images: bool = False,
    ) -> None:
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"{type(processor).__name__} has no image processor, expected a vision-language model's; "
                "give the folder of a model that was saved together with its processor"
            )
        self.processor = processor
        self.max_length = max_length
        self.with_prompt = with_prompt or prompt_only
        self.prompt_only = prompt_only
        self.keep_images = keep_images

    def __call__(self, sample: Sample) -> Encoded:
        """Encode ``sample``.

        Raises:
            SampleError: When its text holds an image placeholder, the processor refuses it, or (in training)
                no token of it carries loss.
            TooLong: When it has more than ``max_length`` tokens.
        """
        where = f"{sample.shard}: sample {sample.key!r}"
        asked = _asked(sample.messages)
        self._check_text(sample.messages, where)
        messages, text = self._render(asked if self.prompt_only else sample.messages, where)
        tensors = self._process(text, sample, where)
        input_ids = tensors["input_ids"]
        length = input_ids.shape[1]
        if self.max_length is not None and length > self.max_length:
            raise TooLong(f"{where}: {length} tokens, more than max_length {self.max_length}")
        role_ids = message_roles(messages, input_ids[0], self.processor)[None]
        is_response = role_ids == Role.RESPONSE
        if not self.with_prompt and not is_response.any():
            raise SampleError(f"{where}: no token carries loss; expected an assistant turn to learn from")
        tensors["labels"] = input_ids.masked_fill(~is_response, IGNORE)
        tensors["role_ids"] = role_ids
        return Encoded(
            tensors=tensors,
            prompt=self._prompt(messages, tensors, sample, where) if self.with_prompt else None,
            columns=sample.fields(),
            images=sample.images if self.keep_images else None,
            messages=asked,
        )

    def filler(self) -> Encoded:
        """A sample with an image that counts for nothing.

        Where processes wait for each other in the vision tower, one whose batch has no image needs it.
        """
        show = [{"type": "image"}, {"type": "text", "text": "."}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": show}, {"role": "assistant", "content": "."}]
        unlimited = SampleEncoder(
            self.processor,
            with_prompt=self.with_prompt,
            prompt_only=self.prompt_only,
            keep_images=self.keep_images,
        )
        sample = Sample(messages, [Image.new("RGB", FILLER_SIZE)], id="filler", shard="filler", key="filler")
        return unlimited(sample).marked_repeated()

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Tokens that images of such heights and widths become; an estimate where the processor does not say."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None or not sizes:
            return sum(height * width for height, width in sizes) / 28**2  # one of Qwen-VL's merged patches
        return float(sum(count(image_sizes=list(sizes)).num_image_tokens))

    def _process(self, text: str, sample: Sample, where: str) -> dict[str, Tensor]:
        bos = self.processor.tokenizer.bos_token
        # A template that writes BOS itself must not get a second one from the tokenizer.
        special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        images = [sample.images] if sample.images else None
        try:
            made = self.processor(text=[text], images=images, return_tensors="pt", **special)
        except (ValueError, TypeError, IndexError, StopIteration) as error:
            kind = type(error).__name__
            raise SampleError(f"{where}: {type(self.processor).__name__} refuses it ({kind}: {error})") from error
        return dict(made)

    def _check_text(self, messages: list[dict[str, Any]], where: str) -> None:
        """Refuse text that would become an image token without an image behind it."""
        for token in placeholder_texts(self.processor):
            if any(token in text for text in _texts(messages)):
                raise SampleError(
                    f'{where}: its text holds the image placeholder {token!r}; use {{"type": "image"}} parts'
                )

    def _render(self, messages: list[dict[str, Any]], where: str) -> tuple[list[dict[str, Any]], str]:
        """Render the chat template, with the messages in the form that the template keeps whole.

        Some templates silently drop content that is a string (LLaVA), or fail (LLaVA-NeXT), others want a string for a
        single text.
        """
        refused = None
        for content in (_as_string, _as_parts):
            form = [{**message, "content": content(message["content"])} for message in messages]
            try:
                text = render(form, self.processor)
            except ChatTemplateError as error:  # it may read one of the two alone
                refused = error
                continue
            # Ends only: templates trim content, and some drop the reasoning of earlier turns.
            if all(part.strip()[-16:] in text for part in _texts(messages)):
                return form, text
        if refused is not None:
            raise SampleError(f"{where}: {refused}") from refused
        raise SampleError(f"{where}: the template of {type(self.processor).__name__} drops part of its messages")

    def _prompt(
        self, messages: list[dict[str, Any]], whole: dict[str, Tensor], sample: Sample, where: str
    ) -> dict[str, Tensor]:
        """The conversation up to its last response, with the header that asks for the next one."""
        asked = _asked(messages)
        if any(part["type"] == "image" for turn in messages[len(asked) :] for part in _as_parts(turn["content"])):
            raise SampleError(f"{where}: its last response shows an image; expected images in earlier turns only")
        text = self.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        made = self._process(text, sample, where)
        prompt = {name: value for name, value in made.items() if is_sequence(value, made["input_ids"])}
        # What it shares with the whole conversation keeps its roles; the rest is the header, OTHER.
        shared = min(made["input_ids"].shape[1], len(whole["input_ids"][0]))
        same = (made["input_ids"][0, :shared] == whole["input_ids"][0, :shared]).int().cumprod(0).bool()
        prompt["role_ids"] = torch.full_like(made["input_ids"], int(Role.OTHER))
        prompt["role_ids"][0, :shared][same] = whole["role_ids"][0, :shared][same]
        return prompt


class Collator:
    """Make one batch of encoded samples.

    Sequences are padded; what else the processor made (pixels, grids, …) is concatenated along its first
    dimension, with zeros where other dimensions differ.

    Args:
        pad_token_id: Value of ``input_ids`` on padding.
        padding_side: Side of the batch's padding; prompts are always padded on the left.
        filler: Makes a sample that is added to a batch without any image (`SampleEncoder.filler`), for several
            processes.
    """

    def __init__(
        self, pad_token_id: int, padding_side: Side = "right", *, filler: Callable[[], Encoded] | None = None
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; expected 'left' or 'right'")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.filler = filler
        self._filled: Encoded | None = None

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """Collate samples.

        Returns:
            ``input_ids, attention_mask, labels, role_ids`` (B, longest N), the processor's other tensors, and
            ``columns``, a list of dicts; ``prompt`` (tensors) and ``images`` (lists) where the samples have
            them.
        """
        if self.filler is not None and not any(sample.has_image for sample in samples):
            self._filled = self._filled or self.filler()
            samples = [*samples, self._filled]
        batch: dict[str, Any] = self.merge([sample.tensors for sample in samples], self.padding_side)
        prompts = [sample.prompt for sample in samples if sample.prompt is not None]
        if prompts:
            batch["prompt"] = self.merge(prompts, "left")
        batch["columns"] = [dict(sample.columns) for sample in samples]
        images = [sample.images for sample in samples if sample.images is not None]
        if images:
            batch["images"] = images
        return batch

    def merge(self, rows: Sequence[Mapping[str, Tensor]], side: Side) -> dict[str, Tensor]:
        """One batch of rows: what each sample alone would give the model, (1, N) where it is a sequence."""
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: self._merge(name, rows, side) for name in names}

    def _merge(self, name: str, rows: Sequence[Mapping[str, Tensor]], side: Side) -> Tensor:
        example = next(row for row in rows if name in row)
        if is_sequence(example[name], example["input_ids"]):
            return self._merge_sequences(name, rows, side)
        values = [row.get(name) for row in rows]
        if has_row_a_sample(example):
            # Such a model expects a row for each sample of the batch, also for one without an image.
            values = [torch.zeros_like(example[name]) if value is None else value for value in values]
        return _concatenate([value for value in values if value is not None])

    def _merge_sequences(
        self, name: str, rows: Sequence[Mapping[str, Tensor]], side: Literal["left", "right"]
    ) -> Tensor:
        fill = self.pad_token_id if name == "input_ids" else _PADDING.get(name, 0)
        example = next(row[name] for row in rows if name in row)
        longest = max(row["input_ids"].shape[1] for row in rows)
        padded = []
        for row in rows:
            length = row["input_ids"].shape[1]
            value = row[name] if name in row else example.new_zeros(1, length, *example.shape[2:])
            margin = (longest - length, 0) if side == "left" else (0, longest - length)
            padded.append(F.pad(value, [0, 0] * (value.ndim - 2) + list(margin), value=fill))
        return _concatenate(padded)


class PromptRows:
    """Leave the prompts of encoded samples apart, for those who group them anew (GRPO)."""

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """Lists with an item a sample: ``rows`` (`Encoded.prompt_row`), ``columns``, ``messages`` and ``images``."""
        return {
            "rows": [sample.prompt_row for sample in samples],
            "columns": [dict(sample.columns) for sample in samples],
            "messages": [sample.messages for sample in samples],
            "images": [sample.images or [] for sample in samples],
        }


def _as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{name: value for name, value in part.items() if value is not None} for part in content]


def _as_string(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    parts = _as_parts(content)
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [part["text"] for message in messages for part in _as_parts(message["content"]) if part["type"] == "text"]


def _asked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def has_image(row: Mapping[str, Tensor]) -> bool:
    """Whether a row of `Collator.merge` has anything of an image."""
    return any(not is_sequence(value, row["input_ids"]) for value in row.values())


def is_sequence(value: Any, input_ids: Tensor) -> bool:
    """Whether something of a batch has a value for each token."""
    return isinstance(value, Tensor) and value.shape[:2] == input_ids.shape


def _concatenate(values: Sequence[Tensor]) -> Tensor:
    """Concatenate along dim 0, zeros filling the trailing dimensions up to the largest."""
    if len({value.shape[1:] for value in values}) == 1:
        return torch.cat(list(values))
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values))]
    padded = []
    for value in values:
        margins = [
            side for size, most in zip(reversed(value.shape[1:]), reversed(largest)) for side in (0, most - size)
        ]
        padded.append(F.pad(value, margins))
    return torch.cat(padded)
