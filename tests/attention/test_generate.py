"""`observe_attention` while a model generates: new rows see the whole cache, as in one single forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from avar_lightning.attention import AttentionRecord, observe_attention, observing
from avar_lightning.roles import Role
from tests.factories import Batch, Conversation, make_batch, tiny_vlm

KEYS = (Role.IMAGE, Role.SYSTEM, Role.RESPONSE)
QUERIES = (Role.USER, Role.RESPONSE)
PROMPTS = (Conversation(response=0), Conversation(response=0, images=2, after=1))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_vlm()


@pytest.fixture(scope="module")
def prompts() -> Batch:
    return make_batch(*PROMPTS, padding_side="left")


def generated(model: PreTrainedModel, batch: Batch, **kwargs: Any) -> tuple[AttentionRecord, Tensor]:
    with observe_attention(model, batch.role_ids, queries=QUERIES, keys=KEYS, received=True) as record:
        tokens = model.generate(**batch.inputs, max_new_tokens=6, do_sample=False, **kwargs)
    return record, tokens


def whole_forward(model: PreTrainedModel, batch: Batch, tokens: Tensor) -> AttentionRecord:
    """One forward over everything that ran through the cache, which is all but the last token."""
    ids = tokens[:, :-1]
    extra = ids.shape[1] - batch.role_ids.shape[1]
    pad = torch.nn.functional.pad
    inputs = batch.inputs | {
        "input_ids": ids,
        "attention_mask": pad(batch.inputs["attention_mask"], (0, extra), value=1),
        "mm_token_type_ids": pad(batch.inputs["mm_token_type_ids"], (0, extra)),
    }
    role_ids = pad(batch.role_ids, (0, extra), value=int(Role.RESPONSE))
    with (
        torch.no_grad(),
        observe_attention(model, role_ids, queries=QUERIES, keys=KEYS, received=True) as record,
    ):
        model(**inputs)
    return record


@pytest.mark.parametrize("cache", [None, "static"])
def test_masses_are_those_of_one_forward(model: PreTrainedModel, prompts: Batch, cache: str | None) -> None:
    record, tokens = generated(model, prompts, cache_implementation=cache)
    expected = whole_forward(model, prompts, tokens)
    assert record.role_ids.equal(expected.role_ids)
    torch.testing.assert_close(record.stacked(), expected.stacked(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(record.vas(), expected.vas(), rtol=1e-2, atol=1e-3)
    for layer in record.layers:
        torch.testing.assert_close(record.received[layer], expected.received[layer], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_only_the_keys_of_the_groups_are_computed(
    model: PreTrainedModel,
    prompts: Batch,
    padded: bool,
    computed: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observing, "MANY", 1.0)  # no wider heads in the prefill
    batch = prompts if padded else make_batch(PROMPTS[0])
    grouped = ((batch.role_ids == Role.IMAGE) | (batch.role_ids == Role.SYSTEM)).sum(1).max().item()
    with observe_attention(model, batch.role_ids, queries=QUERIES):
        model.generate(**batch.inputs, max_new_tokens=6, do_sample=False)
    assert len(computed) == 6 * 2
    assert {keys for _, keys in computed} == {grouped}


def test_tokens_are_those_of_a_plain_generate(model: PreTrainedModel, prompts: Batch) -> None:
    plain = model.generate(**prompts.inputs, max_new_tokens=6, do_sample=False)
    assert generated(model, prompts)[1].equal(plain)


def test_beams_and_returned_sequences_repeat_the_roles(model: PreTrainedModel, prompts: Batch) -> None:
    record, tokens = generated(model, prompts, num_beams=2, num_return_sequences=2)
    assert tokens.shape[0] == 4
    assert record.role_ids.shape[0] == 4
    prompt_rows = record.stacked()[:, :, :, : prompts.role_ids.shape[1]]
    torch.testing.assert_close(prompt_rows[:, 0], prompt_rows[:, 1])


def test_without_a_cache_every_step_is_a_forward_of_its_own(model: PreTrainedModel, prompts: Batch) -> None:
    with pytest.raises(ValueError, match="give the roles of exactly the tokens"):
        generated(model, prompts, use_cache=False)


def test_sliding_window_layers() -> None:
    model = tiny_vlm(
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )
    batch = make_batch(PROMPTS[0])
    record, tokens = generated(model, batch)
    torch.testing.assert_close(record.stacked(), whole_forward(model, batch, tokens).stacked(), rtol=1e-3, atol=1e-5)
    assert record.mass[1][:, :, -1, KEYS.index(Role.SYSTEM)].eq(0).all()


def test_a_cache_that_was_cut_back(model: PreTrainedModel) -> None:
    batch = make_batch(Conversation())
    with torch.no_grad(), observe_attention(model, batch.role_ids, queries=QUERIES, keys=KEYS) as record:
        cache = model(**batch.inputs, use_cache=True).past_key_values
        for token in (5, 6):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        assert record.stacked().shape[3] == batch.role_ids.shape[1] + 2
        cache.crop(-2)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    tokens = torch.cat([batch.inputs["input_ids"], torch.tensor([[7, 0]])], dim=1)
    expected = whole_forward(model, batch, tokens)
    torch.testing.assert_close(record.stacked(), expected.stacked(), rtol=1e-3, atol=1e-5)


def test_a_cache_from_outside_is_refused(model: PreTrainedModel) -> None:
    batch = make_batch(Conversation())
    with torch.no_grad():
        cache = model(**batch.inputs, use_cache=True).past_key_values
        with (
            pytest.raises(ValueError, match="enter observe_attention before"),
            observe_attention(model, torch.tensor([[int(Role.RESPONSE)]])),
        ):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
