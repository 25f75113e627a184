"""Adapters go to the language model alone; the other parts have the same names for every family."""

import pytest
import torch

from avar_lightning.model import LoRAConfig
from tests.families.conftest import ALL

pytestmark = [pytest.mark.capability("LoRA"), pytest.mark.parametrize("family", ALL, indirect=True)]


def test_adapters_are_in_every_layer_of_the_language_model_and_nowhere_else(family):
    model = family.model(lora=LoRAConfig(r=2))
    decoder = model.base_model.model.get_decoder()
    inside = {id(parameter) for parameter in decoder.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(id(p) in inside for p in trained.values())
    for layer in decoder.layers:
        names = {name.split(".")[-4] for name, p in layer.named_parameters() if p.requires_grad}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
def test_every_linear_layer_can_be_a_target(family):
    """`all-linear` of PEFT's world: without an exclusion it would reach into the vision tower."""
    linear = [name for name, module in family.model().named_modules() if isinstance(module, torch.nn.Linear)]
    ends = {name.rpartition(".")[2] for name in linear} - {"lm_head", *"0123456789"}
    model = family.model(lora=LoRAConfig(r=2, targets=sorted(ends)))
    inside = {id(parameter) for parameter in model.base_model.model.get_decoder().parameters()}
    assert all(id(p) in inside for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_parts_freeze_by_name_and_together_are_all_but_the_language_model(family):
    model = family.model(freeze=["vision", "projector"])
    language = {id(p) for m in (model.get_decoder(), model.get_output_embeddings()) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in language), name
    parts = []
    for part in ("vision", "projector"):
        frozen = {name for name, p in family.model(freeze=[part]).named_parameters() if not p.requires_grad}
        assert frozen
        parts.append(frozen)
    assert not parts[0] & parts[1]
    assert any("projector" in n or "merger" in n or "connector" in n for n in parts[1])
