"""Observing and steering in every family: sliding and bidirectional masks, deep stacks, softcap, cross-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from avar_lightning.attention import observe_attention, steer_attention
from avar_lightning.attention.reference import mass_of_probabilities
from avar_lightning.attention.steering import MODES
from avar_lightning.roles import Role
from tests.attention.families import FAMILIES, SOFTCAPPED, Family, padded_on_the_right
from tests.attention.oracle import Growing, Steered, expected, oracle

KEYS, QUERIES = (Role.IMAGE, Role.SYSTEM), (Role.USER, Role.RESPONSE)


@pytest.mark.parametrize("family", [*FAMILIES.values(), SOFTCAPPED], ids=[*FAMILIES, "PaliGemma 2"])
@torch.no_grad()
def test_masses_are_those_that_eager_returns(family: Family) -> None:
    model = family.build()
    inputs, roles = family.make()
    model.set_attn_implementation({"text_config": "eager"})
    attentions = [a for a in model(**inputs, output_attentions=True).attentions if a is not None]
    attentions = [a for a in attentions if a.shape[-1] == roles.shape[1]]  # no cross-attention
    masses = torch.stack([mass_of_probabilities(a, roles, KEYS) for a in attentions])
    masses *= torch.isin(roles, torch.tensor(QUERIES))[None, :, None, :, None]
    for attn in family.attn:
        model.set_attn_implementation({"text_config": attn})
        plain = model(**inputs).logits
        with observe_attention(model, roles, queries=QUERIES, keys=KEYS) as record:
            inside = model(**inputs).logits
        assert inside.equal(plain)
        assert record.layers == family.layers
        torch.testing.assert_close(record.stacked(), masses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", [None, QUERIES, "last"], ids=["every", "text", "last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_steering_is_the_oracle_s(name: str, mode: Any, rows: Any, padding_side: str) -> None:
    family = FAMILIES[name]
    inputs, roles = family.make()
    if padding_side == "right":
        inputs, roles = padded_on_the_right(inputs, roles)
    text = torch.isin(roles, torch.tensor(QUERIES))
    selected = None if rows is None else text
    if rows == "last":
        last = [int(mask.nonzero().max()) for mask in inputs["attention_mask"]]
        selected = torch.nn.functional.one_hot(torch.tensor(last), roles.shape[1]).bool()
    logits, masses = expected(family.build, inputs, Steered(roles, 0.5, 0.7, mode, rows=selected), KEYS)
    for attn in family.attn:
        model = family.build()
        model.set_attn_implementation({"text_config": attn})
        with (
            observe_attention(model, roles, queries=QUERIES, keys=KEYS) as record,
            steer_attention(model, roles, image=0.5, system=0.7, mode=mode, queries=rows),
        ):
            steered = model(**inputs).logits
        assert not torch.allclose(steered[text], model(**inputs).logits[text], atol=1e-3)
        torch.testing.assert_close(steered[text].double(), logits[text], rtol=1e-3, atol=5e-4)
        ours = record.stacked().double()
        torch.testing.assert_close(ours, masses * text[None, :, None, :, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_generation_is_the_oracle_s_without_a_cache(name: str, mode: Any) -> None:
    family = FAMILIES[name]
    inputs, roles = family.make()
    model, twin = family.build(), family.build()
    twin.set_attn_implementation({"text_config": "oracle"})
    options: Any = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    options |= {"suppress_tokens": [60, 61, 62], "return_dict_in_generate": True, "output_logits": True}
    with steer_attention(model, roles, image=0.5, system=0.7, mode=mode):
        ours = model.generate(**inputs, **options)
    growing: Any = Growing(roles, twin)
    with oracle(Steered(growing, 0.5, 0.7, mode)):
        theirs = twin.generate(**inputs, **options, use_cache=False)
    assert ours.sequences.equal(theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-3, atol=5e-4)
    plain = model.generate(**inputs, **options)
    assert not torch.allclose(plain.logits[0], ours.logits[0], atol=1e-3)


@torch.no_grad()
def test_cross_attention_is_left_alone_and_refused_when_asked_for() -> None:
    family = FAMILIES["Llama-3.2-Vision"]
    model, (inputs, roles) = family.build(), family.make()
    for context in (observe_attention, steer_attention):
        with pytest.raises(ValueError, match=r"layers \[1\]"), context(model, roles, layers=[1]):
            model(**inputs)


@torch.no_grad()
def test_softcap_is_refused() -> None:
    model, (inputs, roles) = SOFTCAPPED.build(), SOFTCAPPED.make()
    model.set_attn_implementation({"text_config": "eager"})
    with pytest.raises(ValueError, match=r"softcap \(2.0\) cannot be steered"), steer_attention(model, roles):
        model(**inputs)
