"""The wrapper in transformers' registry: invisible where nobody observes, and for every kind of base."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.utils.generic import is_flash_attention_requested

from avar_lightning.attention import observe_attention
from avar_lightning.attention.reference import eager_probabilities, mass_of_probabilities
from avar_lightning.attention.registry import PREFIX, AttentionCall, install
from avar_lightning.roles import Role
from tests.factories import Conversation, make_batch, tiny_vlm

BATCH = make_batch(Conversation(), Conversation(images=2))


def fake_flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What FlashAttention computes on 2-D padding, by way of SDPA; insists on its own name, as that does."""
    assert module.config._attn_implementation == "fake_flash_attention_2"
    assert attention_mask is None or attention_mask.dim() == 2
    num_keys = key.shape[2]
    mask = torch.ones(query.shape[2], num_keys, dtype=torch.bool).tril(num_keys - query.shape[2])[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None, None]
        # Rows without keys, which FlashAttention leaves out, would be NaN.
        mask = mask | ~mask.any(-1, keepdim=True)
    elif (starts := starts_of(kwargs)) is not None:
        for start, stop in pairwise([*starts, num_keys]):
            mask[..., start:stop, :start] = False
    if kwargs.get("sliding_window") is not None:
        mask = mask.triu(num_keys - query.shape[2] - kwargs["sliding_window"] + 1)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=kwargs["scaling"])


def starts_of(kwargs: dict[str, Any]) -> list[int] | None:
    """Where packed sequences start, by lengths that add up or by positions."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return kwargs["cu_seq_lens_q"].tolist()[:-1]
    positions = kwargs.get("position_ids")
    if positions is None or positions.shape[0] > 1:
        return None
    return [i for i, position in enumerate(positions[0].tolist()) if position == 0 and positions.shape[1] > 1] or None


AttentionInterface.register("fake_flash_attention_2", fake_flash)
AttentionMaskInterface.register("fake_flash_attention_2", flash_attention_mask)


def test_only_the_text_config_is_changed_and_only_once() -> None:
    model = tiny_vlm()
    for _ in range(2):
        install(model.get_decoder())
    assert model.config.text_config._attn_implementation == PREFIX + "sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_model_has_no_trace(tmp_path: Path) -> None:
    model = tiny_vlm()
    with observe_attention(model, BATCH.role_ids):
        model.save_pretrained(tmp_path / "inside")
    model.save_pretrained(tmp_path / "after")
    tiny_vlm().save_pretrained(tmp_path / "never")
    never = json.loads((tmp_path / "never" / "config.json").read_text())
    for name in ("inside", "after"):
        assert json.loads((tmp_path / name / "config.json").read_text()) == never
        assert not any("avar" in file.read_text(errors="ignore") for file in (tmp_path / name).glob("*.json"))
    loaded = type(model).from_pretrained(tmp_path / "after").eval()
    assert loaded(**BATCH.inputs).logits.equal(model(**BATCH.inputs).logits)


def test_names_keep_what_transformers_reads_from_them() -> None:
    assert is_flash_attention_requested(requested_attention_implementation=PREFIX + "flash_attention_2", version=2)
    assert not is_flash_attention_requested(requested_attention_implementation=PREFIX + "flash_attention_3", version=2)
    assert not is_flash_attention_requested(requested_attention_implementation=PREFIX + "sdpa")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("sliding", [False, True])
def test_beside_a_flash_kernel(padding_side: str, sliding: bool) -> None:
    batch = make_batch(Conversation(), Conversation(images=2), padding_side=padding_side)
    layer_types = ["full_attention", "sliding_attention"]
    model = tiny_vlm(**{"use_sliding_window": True, "sliding_window": 5, "layer_types": layer_types} if sliding else {})
    with observe_attention(model, batch.role_ids, queries=(Role.USER, Role.RESPONSE)) as expected:
        model(**batch.inputs)
    model.set_attn_implementation({"text_config": "fake_flash_attention_2"})
    plain = model(**batch.inputs).logits
    with observe_attention(model, batch.role_ids, queries=(Role.USER, Role.RESPONSE)) as record:
        inside = model(**batch.inputs).logits
    assert model.config.text_config._attn_implementation == PREFIX + "fake_flash_attention_2"
    assert inside.equal(plain)
    torch.testing.assert_close(record.stacked(), expected.stacked(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("sliding", [False, True])
def test_sequences_packed_for_flash_are_as_if_alone(told_by: str, sliding: bool) -> None:
    config = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
    model = tiny_vlm(**config if sliding else {})
    batches = [make_batch(Conversation(images=0, response=count)) for count in (6, 3, 9)]
    queries = (Role.USER, Role.RESPONSE)
    alone = []
    for batch in batches:
        with observe_attention(model, batch.role_ids, queries=queries) as record:
            model(**batch.inputs)
        alone.append(record.stacked())
    lengths = [batch.role_ids.shape[1] for batch in batches]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.cat([batch.inputs["input_ids"] for batch in batches], dim=1)
    options: dict[str, Any] = {"position_ids": positions.expand(4, 1, -1)}
    if told_by == "cu_seq_lens":
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        options["position_ids"] = options["position_ids"] + 7  # of which the first is no 0
    role_ids = torch.cat([batch.role_ids for batch in batches], dim=1)
    model.set_attn_implementation({"text_config": "fake_flash_attention_2"})
    with observe_attention(model, role_ids, queries=queries) as record:
        model(input_ids=ids, **options)
    masses = record.stacked().split(lengths, dim=3)
    torch.testing.assert_close(list(masses), alone, rtol=1e-4, atol=1e-5)


def test_lengths_of_several_rows_are_refused() -> None:
    model = tiny_vlm()
    model.set_attn_implementation({"text_config": "fake_flash_attention_2"})
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    role_ids = torch.full((2, 4), Role.USER)
    with pytest.raises(ValueError, match="into 2 rows"), observe_attention(model, role_ids):
        model(input_ids=torch.full((2, 4), 5), **options)


def test_packed_sequences_over_a_cache_are_refused() -> None:
    q, k = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 6, 4)
    call = AttentionCall("flash_attention_2", nn.Module(), q, k, None, {"position_ids": torch.tensor([[0, 1, 0, 1]])})
    with pytest.raises(ValueError, match=r"packed sequences of 4 rows over 6 keys .* pad them"):
        call.documents()


def test_flash_decoding_sees_the_whole_cache() -> None:
    batch = make_batch(Conversation(response=0), Conversation(response=0, images=2), padding_side="left")
    records = []
    for attn in ("sdpa", "fake_flash_attention_2"):
        model = tiny_vlm()
        model.set_attn_implementation({"text_config": attn})
        with observe_attention(model, batch.role_ids, queries=(Role.RESPONSE,)) as record:
            model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
        records.append(record.stacked())
    torch.testing.assert_close(records[1], records[0], rtol=1e-4, atol=1e-5)


def test_the_base_is_called_with_what_the_model_gave_it() -> None:
    calls: list[dict[str, Any]] = []

    def spy(module: nn.Module, *tensors: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(kwargs)
        return sdpa_attention_forward(module, *tensors, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", AttentionMaskInterface()["sdpa"])
    model = tiny_vlm()
    model.set_attn_implementation({"text_config": "spy"})
    model(**BATCH.inputs)
    plain = [set(call) for call in calls]
    calls.clear()
    with observe_attention(model, BATCH.role_ids):
        model(**BATCH.inputs)
    assert [set(call) for call in calls] == plain


def test_a_model_past_the_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vlm()
    for layer in model.get_decoder().layers:
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match="does not go through"), observe_attention(model, BATCH.role_ids):
        model(**BATCH.inputs)


def test_one_layer_past_the_registry_is_refused_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vlm()
    attention = model.get_decoder().layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with observe_attention(model, BATCH.role_ids) as record:
        model(**BATCH.inputs)
    assert record.layers == (0,)
    with (
        pytest.raises(ValueError, match=r"layers \[1\]"),
        observe_attention(model, BATCH.role_ids, layers=[1]),
    ):
        model(**BATCH.inputs)


def capped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    probs = eager_probabilities(query, key, attention_mask, scale=kwargs["scaling"], softcap=kwargs.get("softcap"))
    return (probs @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)).transpose(1, 2), probs


AttentionInterface.register("capped", capped_attention)
AttentionMaskInterface.register("capped", AttentionMaskInterface()["eager"])


def test_softcap_reaches_the_masses() -> None:
    model = tiny_vlm()
    model.set_attn_implementation({"text_config": "capped"})
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(BATCH.inputs["input_ids"]),
        "attention_mask": BATCH.inputs["attention_mask"],
        "output_attentions": True,
    }
    masses = []
    for softcap in (None, 0.5):
        with observe_attention(model, BATCH.role_ids, queries=(Role.USER,), keys=(Role.IMAGE,)) as record:
            out = model.get_decoder()(**inputs, softcap=softcap)
        masses.append(torch.stack([mass_of_probabilities(a, BATCH.role_ids, (Role.IMAGE,)) for a in out.attentions]))
        expected = masses[-1] * (BATCH.role_ids == Role.USER)[None, :, None, :, None]
        torch.testing.assert_close(record.stacked(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*masses)
