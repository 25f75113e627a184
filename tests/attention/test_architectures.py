"""Masses in other families than Qwen: sliding and bidirectional masks, softcap, cross-attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from avar_lightning.attention import observe_attention
from avar_lightning.attention.reference import mass_of_probabilities
from avar_lightning.roles import Role

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IDS = torch.randint(3, 59, (2, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
ROLES = torch.tensor([[1] * 3 + [3] * 2 + [2] * 3 + [4] * 2, [0] * 3 + [1] + [3] + [2] * 3 + [4] * 2])
KEYS, QUERIES = (Role.IMAGE, Role.SYSTEM), (Role.USER, Role.RESPONSE)


def llava() -> PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=60
    )
    return hf.LlavaForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"]
    text = hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, layer_types=layers, query_pre_attn_scalar=8)
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=hf.SiglipVisionConfig(**VISION))
    )


def paligemma2() -> PreTrainedModel:
    text = hf.Gemma2Config(**TEXT, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION), text_config=text, image_token_index=60, projection_dim=32
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def mllama() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope}
    vision = {name: value for name, value in VISION.items() if name != "num_attention_heads"}
    vision |= {
        "attention_heads": 2,
        "num_global_layers": 1,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    }
    return hf.MllamaForConditionalGeneration(hf.MllamaConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize("build", [llava, gemma3, paligemma2, mllama])
@torch.no_grad()
def test_masses_are_those_that_eager_returns(build: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if build in (gemma3, paligemma2):
        inputs["token_type_ids"] = torch.zeros_like(IDS)
    model.set_attn_implementation({"text_config": "eager"})
    attentions = [a for a in model(**inputs, output_attentions=True).attentions if a is not None]
    expected = torch.stack([mass_of_probabilities(a, ROLES, KEYS) for a in attentions])
    expected *= torch.isin(ROLES, torch.tensor(QUERIES))[None, :, None, :, None]
    # SDPA refuses softcap.
    for attn in ("eager",) if build is paligemma2 else ("eager", "sdpa"):
        model.set_attn_implementation({"text_config": attn})
        plain = model(**inputs).logits
        with observe_attention(model, ROLES, queries=QUERIES, keys=KEYS) as record:
            inside = model(**inputs).logits
        assert inside.equal(plain)
        assert record.layers == ((0, 2) if build is mllama else (0, 1))
        torch.testing.assert_close(record.stacked(), expected, rtol=1e-4, atol=1e-5)


def test_a_cross_attention_layer_is_refused_when_asked_for() -> None:
    model = mllama().eval()
    with pytest.raises(ValueError, match=r"layers \[1\]"), observe_attention(model, ROLES, layers=[1]):
        model(input_ids=IDS, attention_mask=MASK)
