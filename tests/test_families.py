"""Families that are not in the table: what transformers says of them is used, and what it does not say is asked for."""

import pytest
import torch
import transformers as hf

from avar_lightning.families import FAMILIES, family_of, part_pattern, sharding_units
from avar_lightning.model import LoRAConfig, _add_lora, _freeze
from tests.attention.families import paligemma2
from tests.factories import tiny_vlm


def test_an_unknown_family_is_read_off_the_model():
    model = paligemma2()
    assert model.config.model_type not in FAMILIES
    family = family_of(model)
    assert family.vision == ("vision_tower",)
    assert family.projector == ("multi_modal_projector",)
    decoder = {id(p) for p in model.get_decoder().parameters()}
    adapted = _add_lora(model, LoRAConfig(r=2, targets=["q_proj", "fc1", "linear"]), on_meta=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(id(p) in {id(q) for q in adapted.base_model.model.get_decoder().parameters()} for p in trained)
    assert decoder


def test_a_model_whose_vision_has_no_known_name_is_refused_with_the_fix():
    text = {"model_type": "persimmon", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = hf.FuyuForCausalLM(
            hf.FuyuConfig(text_config=text, patch_size=2, **{k: v for k, v in text.items() if k != "model_type"})
        )
    with pytest.raises(ValueError, match=r"'fuyu' has no module .* add it to FAMILIES in avar_lightning/families.py"):
        family_of(model)
    with pytest.raises(ValueError, match="fuyu"):
        _freeze(model, "vision")
    # What is said by hand needs no table.
    _freeze(model, "vision_embed_tokens")
    assert _add_lora(model, LoRAConfig(r=2, targets=["dense"], exclude=".*vision.*"), on_meta=True)


def test_units_are_whole_layers():
    with torch.device("meta"):
        config = hf.SmolVLMConfig(text_config={"model_type": "llama", "num_hidden_layers": 1})
        model = hf.SmolVLMForConditionalGeneration(config)
    assert sharding_units(model) == {"LlamaDecoderLayer", "SmolVLMEncoderLayer"}
    kinds = {type(module).__name__ for module in model.modules()}
    assert sharding_units(model) <= kinds


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parts_do_not_overlap(model_type):
    import re

    family = FAMILIES[model_type]
    for name in family.vision:
        assert re.search(part_pattern(family, "vision"), f"model.{name}.layers.0")
        assert not re.search(part_pattern(family, "projector"), f"model.{name}.layers.0")
        assert not re.search(part_pattern(family, "vision"), f"model.language_model.not_{name}.layers.0")
    for name in family.projector:
        assert re.search(part_pattern(family, "projector"), f"model.{name}")
        assert not re.search(part_pattern(family, "vision"), f"model.{name}.linear")


def test_a_model_without_layers_to_share_is_refused(monkeypatch):
    model = tiny_vlm()
    assert sharding_units(model) == {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"}
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(ValueError, match=r"_no_split_modules is None.*use ddp"):
        sharding_units(model)
