"""Encoding with a real Qwen2.5-VL processor, and batches of whatever a processor makes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from avar_lightning.data.collate import Collator, Encoded, SampleEncoder, TooLong
from avar_lightning.data.sample import Sample, SampleError
from avar_lightning.roles import Role
from tests.data.conftest import make_sample


def decode(processor: ProcessorMixin, ids: Tensor) -> str:
    return processor.tokenizer.decode(ids)


def test_labels_are_the_response(processor: ProcessorMixin):
    tensors = SampleEncoder(processor)(make_sample(images=2)).tensors
    ids, labels, roles = (tensors[name][0] for name in ("input_ids", "labels", "role_ids"))
    assert torch.equal(labels != -100, roles == Role.RESPONSE)
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert decode(processor, labels[labels != -100]).removesuffix("\n") == "red red red<|im_end|>"
    assert torch.equal(roles == Role.IMAGE, ids == processor.image_token_id)
    assert int((roles == Role.IMAGE).sum()) == 18  # two images of 84x84: 9 tokens each
    assert tensors["image_grid_thw"].tolist() == [[1, 6, 6]] * 2


def test_the_prompt_ends_where_the_response_begins(processor: ProcessorMixin):
    encoded = SampleEncoder(processor, with_prompt=True)(make_sample(images=2))
    assert encoded.prompt is not None
    prompt = encoded.prompt["input_ids"][0]
    assert torch.equal(prompt, encoded.tensors["input_ids"][0, : len(prompt)])
    assert decode(processor, prompt).endswith("<|im_start|>assistant\n")
    assert set(encoded.prompt) >= {"input_ids", "attention_mask", "role_ids"}
    assert "pixel_values" not in encoded.prompt
    roles = encoded.prompt["role_ids"][0]
    assert int((roles == Role.IMAGE).sum()) == 18
    assert not (roles == Role.RESPONSE).any()


def test_an_earlier_response_stays_in_the_prompt(processor: ProcessorMixin):
    sample = make_sample()
    sample.messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    encoded = SampleEncoder(processor, with_prompt=True)(sample)
    assert encoded.prompt is not None
    text = decode(processor, encoded.prompt["input_ids"][0])
    assert "red red red" in text
    assert "Yes." not in text
    assert (encoded.prompt["role_ids"] == Role.RESPONSE).any()


def test_a_question_alone_is_fit_for_evaluation_only(processor: ProcessorMixin):
    sample = make_sample(answered=False)
    sample.shard, sample.key = "x.tar", "k1"
    with pytest.raises(SampleError, match=r"x.tar: sample 'k1': no token carries loss"):
        SampleEncoder(processor)(sample)
    encoded = SampleEncoder(processor, with_prompt=True)(sample)
    assert (encoded.tensors["labels"] == -100).all()
    assert encoded.prompt is not None
    assert decode(processor, encoded.prompt["input_ids"][0]).endswith("<|im_start|>assistant\n")


def test_a_long_sample_is_refused_whole(processor: ProcessorMixin):
    length = len(SampleEncoder(processor)(make_sample()))
    assert len(SampleEncoder(processor, max_length=length)(make_sample())) == length
    with pytest.raises(TooLong, match=f"{length} tokens, more than max_length {length - 1}"):
        SampleEncoder(processor, max_length=length - 1)(make_sample())


def test_a_placeholder_in_text_is_refused(processor: ProcessorMixin):
    sample = Sample(messages=[{"role": "user", "content": "What is <|image_pad|>?"}])
    with pytest.raises(SampleError, match=r"holds the image placeholder '<\|image_pad\|>'"):
        SampleEncoder(processor, with_prompt=True)(sample)


def test_what_the_processor_refuses_is_a_bad_sample(processor: ProcessorMixin):
    sample = make_sample()
    sample.images = [Image.new("RGB", (1, 800))]  # Qwen refuses such an aspect ratio
    with pytest.raises(SampleError, match="refuses it"):
        SampleEncoder(processor)(sample)


def test_a_tokenizer_alone_has_no_image_processor(processor: ProcessorMixin):
    with pytest.raises(ValueError, match="has no image processor, expected a vision-language model's"):
        SampleEncoder(SimpleNamespace(tokenizer=processor.tokenizer))


DROPS_STRINGS = """\
{%- for message in messages -%}<|im_start|>{{ message.role }}
{% for part in message.content | selectattr('type', 'equalto', 'image') %}<|image_pad|>{% endfor %}
{%- for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor -%}"""


def test_a_template_that_drops_strings_gets_parts(processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processor, "chat_template", DROPS_STRINGS)
    tensors = SampleEncoder(processor)(make_sample()).tensors
    assert "red red red" in decode(processor, tensors["input_ids"][0])


def test_a_template_that_drops_text_is_refused(processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages[0].role }}")
    with pytest.raises(SampleError, match="drops part of its messages"):
        SampleEncoder(processor)(make_sample())


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mixed_batch(processor: ProcessorMixin, side: str):
    encode = SampleEncoder(processor, with_prompt=True, keep_images=True)
    samples = [make_sample(0, images=2, words=9), make_sample(1, images=0), make_sample(2, images=1, words=1)]
    alone = [encode(sample) for sample in samples]
    batch = Collator(processor.tokenizer.pad_token_id, side)(alone)
    longest = max(map(len, alone))
    fills = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100}
    for name in ("input_ids", "attention_mask", "labels", "role_ids", "mm_token_type_ids"):
        assert batch[name].shape == (3, longest)
        for row, encoded in zip(batch[name], alone):
            margin = longest - len(encoded)
            kept, filled = (
                (row[: len(encoded)], row[len(encoded) :]) if side == "right" else (row[margin:], row[:margin])
            )
            assert torch.equal(kept, encoded.tensors[name][0])
            assert (filled == fills.get(name, 0)).all()
    assert torch.equal(batch["pixel_values"], torch.cat([alone[i].tensors["pixel_values"] for i in (0, 2)]))
    assert len(batch["image_grid_thw"]) == 3
    assert batch["columns"] == [sample.fields() for sample in samples]
    assert [len(images) for images in batch["images"]] == [2, 0, 1]
    mask = batch["prompt"]["attention_mask"]
    assert (mask[:, -1] == 1).all()  # prompts end together: left padding
    assert torch.equal(mask, mask.cummax(dim=1).values)


def test_a_batch_of_text_alone_has_no_pixels(processor: ProcessorMixin):
    batch = Collator(0)([SampleEncoder(processor)(make_sample(images=0)) for _ in range(2)])
    assert "pixel_values" not in batch
    assert "prompt" not in batch
    assert "images" not in batch


def encoded(length: int, **tensors: Tensor) -> Encoded:
    return Encoded({"input_ids": torch.ones(1, length, dtype=torch.long), **tensors}, None, {}, None)


def test_trailing_dimensions_are_filled_with_zeros():
    """LLaVA-NeXT: (images, patches, 3, H, W) with different numbers of patches."""
    few, many = torch.ones(1, 2, 3, 4, 4), torch.ones(2, 5, 3, 4, 4)
    sizes = torch.ones(1, 2), torch.ones(2, 2)
    batch = Collator(0)(
        [
            encoded(3, pixel_values=few, image_sizes=sizes[0]),
            encoded(4),
            encoded(5, pixel_values=many, image_sizes=sizes[1]),
        ]
    )
    assert batch["pixel_values"].shape == (3, 5, 3, 4, 4)
    assert batch["pixel_values"].sum() == few.sum() + many.sum()
    assert torch.equal(batch["pixel_values"][0, :2], few[0])


def test_row_a_sample_layout_keeps_a_row_for_text():
    """Llama-3.2-Vision: (samples, images, tiles, 3, H, W) and a mask over the sequence."""
    image = {
        "pixel_values": torch.ones(1, 1, 4, 3, 2, 2),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 6, 1, 4, dtype=torch.long),
    }
    batch = Collator(0)([encoded(4), encoded(6, **image)])
    assert batch["pixel_values"].shape == (2, 1, 4, 3, 2, 2)
    assert batch["pixel_values"][0].abs().sum() == 0
    assert batch["aspect_ratio_ids"].tolist() == [[0], [1]]
    assert batch["cross_attention_mask"].shape == (2, 6, 1, 4)
    assert batch["cross_attention_mask"][0].sum() == 0


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="'middle'; expected 'left' or 'right'"):
        Collator(0, "middle")


def test_prompt_rows_are_what_each_sample_alone_gives(make_data):
    batch = next(iter(make_data(train_prompts=True, batch_size=3).train_dataloader()))
    assert len(batch["rows"]) == len(batch["columns"]) == len(batch["messages"]) == len(batch["images"]) == 3
    for row, messages, images in zip(batch["rows"], batch["messages"], batch["images"]):
        assert messages[-1]["role"] == "user"
        assert len(images) == len(row["image_grid_thw"]) == 1
        assert row["input_ids"].shape == row["role_ids"].shape == row["attention_mask"].shape
        assert not (row["role_ids"] == Role.RESPONSE).any()
        assert "labels" not in row
