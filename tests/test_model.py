import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from avar_lightning.data.demo_base import write_blank_base
from avar_lightning.model import LoRAConfig, VLMConfig, load_model
from avar_lightning.processing import DEMO_BASE

BLANK = {"pretrained": "demo", "from_scratch": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small trained-like checkpoint on disk."""
    path = write_blank_base(tmp_path_factory.mktemp("base"))
    load_model(VLMConfig(str(path), from_scratch=True)).save_pretrained(path)
    return path


def test_loads_in_the_dtype_and_attention_asked_for(folder):
    model = load_model(VLMConfig(str(folder), dtype="bfloat16", attn_implementation="eager"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"
    assert not model.training


def test_a_name_is_enough(folder):
    assert next(load_model(str(folder)).parameters()).dtype == torch.float32


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_keys_that_do_not_load_are_an_error(folder, tmp_path, fault):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(key for key in weights if "q_proj.weight" in key)
    weights[name + "_old"] = weights[name].clone()
    if fault == "missing":
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit Qwen2_5_VL"):
        load_model(str(tmp_path))


def test_lora_trains_adapters_of_the_language_model_only():
    model = load_model(VLMConfig(**BLANK, lora=LoRAConfig(r=4)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name and "visual" not in name for name in trained)


def test_lora_without_a_matching_layer_names_the_targets():
    with pytest.raises(ValueError, match=r"targets \['nothing'\]"):
        load_model(VLMConfig(**BLANK, lora=LoRAConfig(targets=["nothing"])))


def test_freeze_stops_what_it_matches():
    model = load_model(VLMConfig(**BLANK, freeze=["visual"]))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "visual" in name}


def test_freeze_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="'vision_towr' matches no parameter"):
        load_model(VLMConfig(**BLANK, freeze=["vision_towr"]))


def test_gradient_checkpointing_is_not_reentrant():
    model = load_model(VLMConfig(**BLANK, gradient_checkpointing=True))
    layer = model.get_decoder().layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_lora_as_a_checkpoint_keeps_it():
    assert VLMConfig(lora={"r": 3}).lora == LoRAConfig(r=3)


def test_the_shipped_tokenizer_is_the_one_that_the_recipe_makes(tmp_path):
    made = json.loads((write_blank_base(tmp_path) / "tokenizer.json").read_text())
    assert made == json.loads((DEMO_BASE / "tokenizer.json").read_text())


def test_a_kernel_that_cannot_be_used_is_named():
    with pytest.raises(ValueError, match=r"attn_implementation 'flash_attention_9' cannot be used with 'demo': .*sdpa"):
        load_model(VLMConfig(**BLANK, attn_implementation="flash_attention_9"))


def test_on_meta_it_is_the_same_model_without_weights():
    config = VLMConfig(**BLANK, lora=LoRAConfig(r=4), freeze=["visual"], dtype="bfloat16", gradient_checkpointing=True)
    whole, blank = load_model(config), load_model(config, on_meta=True)
    assert {p.device.type for p in [*blank.parameters(), *blank.buffers()]} == {"meta"}
    of = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()} for model in (whole, blank)]
    assert of[0] == of[1]
