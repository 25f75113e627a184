"""Overlays for real hardware: the real architectures, without their weights."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn

from avar_lightning import GRPOModule, SFTModule
from avar_lightning.attention import find_vlm
from avar_lightning.cli import AvarCLI
from avar_lightning.data import ShardDataModule
from avar_lightning.families import sharding_units
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import DEMO_BASE
from avar_lightning.strategies import FSDP2Strategy

ROOT = Path(__file__).parents[1]
CONFIGS, ARCHITECTURES = ROOT / "configs", Path(__file__).with_name("architectures")
# What a CPU has not; everything else of an overlay is built as it stands.
ON_ONE_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
# Of each: GPUs, samples in an update, weights, and weights that train.
OVERLAYS = {
    "qwen2_5_vl_3b_qlora_24gb": ("qwen2_5_vl_3b", 1, 32, 3.75e9, 29_933_568),
    "qwen2_5_vl_7b_lora_80gb": ("qwen2_5_vl_7b", 1, 64, 8.29e9, 40_370_176),
    "qwen2_5_vl_7b_full_8x80gb": ("qwen2_5_vl_7b", 8, 512, 8.29e9, None),
    "qwen2_5_vl_72b_full_64x80gb": ("qwen2_5_vl_72b", 64, 512, 73.4e9, None),
}


def build(*names, options=()):
    files = [f"--config={CONFIGS / name}.yaml" for name in names]
    return AvarCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=[*files, *ON_ONE_CPU, *options],
    )


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a real architecture's configuration, and the demo's processor in place of its own."""

    def make(name):
        for file in DEMO_BASE.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "config.json").write_bytes((ARCHITECTURES / name / "config.json").read_bytes())
        return str(tmp_path)

    return make


def by_hand(pretrained):
    """Weights of the language model's linear layers and of all the rest, from the dimensions alone."""
    config = yaml.safe_load((Path(pretrained) / "config.json").read_text())  # JSON is YAML
    text, vision = config["text_config"], config["vision_config"]
    hidden, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    keys = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    linear = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    vectors = layers * (hidden + 2 * keys + 2 * hidden) + hidden
    words = text["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    width, wide, merged = vision["hidden_size"], vision["intermediate_size"], 4 * vision["hidden_size"]
    block = 4 * width * width + 4 * width + 3 * width * wide + 2 * wide + width + 2 * width
    patches = 3 * 2 * 14 * 14 * width
    merger = width + merged * merged + merged + merged * vision["out_hidden_size"] + vision["out_hidden_size"]
    return linear, vectors + words + vision["depth"] * block + patches + merger


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_the_model_that_it_says(overlay, pretrained):
    architecture, _, _, weights, trained = OVERLAYS[overlay]
    folder = pretrained(architecture)
    cli = build("avar_sft", overlay, options=[f"--model.init_args.vlm.pretrained={folder}"])
    assert type(cli.model) is SFTModule
    assert type(cli.datamodule) is ShardDataModule
    model = load_model(cli.model.vlm, on_meta=True)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    linear, rest = by_hand(folder)
    assert linear + rest == pytest.approx(weights, rel=0.01)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trains == (trained or linear + rest)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if cli.model.vlm.quantization:  # two weights a byte
        packed = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
        assert (packed, frozen - packed) == (linear // 2, rest)
    else:
        assert frozen == (linear + rest if cli.model.vlm.lora else 0)
    dtypes = {p.dtype for p in model.parameters() if not p.requires_grad} - {torch.uint8}
    assert dtypes == ({torch.bfloat16} if cli.model.vlm.lora else set())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    vlm = find_vlm(model)
    assert all(layer.gradient_checkpointing for layer in vlm.get_decoder().layers)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == (7 * vlm.config.text_config.num_hidden_layers if cli.model.vlm.lora else 0)
    assert all(".language_model.layers." in name and "visual" not in name for name in adapted)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_batch_size_and_processes_are_what_the_comment_says(overlay):
    written = yaml.safe_load((CONFIGS / f"{overlay}.yaml").read_text())
    text = (CONFIGS / f"{overlay}.yaml").read_text()
    trainer, data = written["trainer"], written["data"]["init_args"]
    _, gpus, samples, *_ = OVERLAYS[overlay]
    assert trainer.get("num_nodes", 1) * trainer["devices"] == gpus
    assert gpus * data["batch_size"] * trainer["accumulate_grad_batches"] == samples
    assert f"= {samples}." in next(line for line in text.splitlines() if line.startswith("# Batch: "))
    # A group of samples of similar length must make whole batches on all GPUs.
    assert data["length_group"] % (gpus * data["batch_size"]) == 0
    assert f"# Estimate: avar doctor --config configs/avar_sft.yaml --config configs/{overlay}.yaml" in text


def strategy_of(overlay):
    """The strategy as the trainer would make it; it asks for GPUs and processes only when it sets them up."""
    written = yaml.safe_load((CONFIGS / f"{overlay}.yaml").read_text())["trainer"]
    parser = ArgumentParser()
    parser.add_argument("--strategy", type=Strategy)
    return parser.instantiate(parser.parse_object({"strategy": written["strategy"]})).strategy


@pytest.mark.parametrize(
    ("overlay", "kind"),
    [("qwen2_5_vl_7b_full_8x80gb", FSDPStrategy), ("qwen2_5_vl_72b_full_64x80gb", FSDP2Strategy)],
)
def test_each_layer_is_a_unit_of_sharding(overlay, kind, pretrained):
    strategy = strategy_of(overlay)
    assert isinstance(strategy, kind)
    model = load_model(VLMConfig(pretrained(OVERLAYS[overlay][0])), on_meta=True)
    named = (
        {cls.__name__ for cls in strategy.kwargs["auto_wrap_policy"]._module_classes} if kind is FSDPStrategy else ()
    )
    names = set(named or sharding_units(find_vlm(model)))
    units = [module for module in model.modules() if type(module).__name__ in names]
    assert len(units) == find_vlm(model).config.text_config.num_hidden_layers + 32
    assert units_hold_all_but_ends(model, units)


def units_hold_all_but_ends(model: nn.Module, units: list[nn.Module]) -> bool:
    """Whether what is outside of the sharding units is embeddings, output head, merger and final norm only."""
    inside = {id(p) for unit in units for p in unit.parameters()}
    outside = {name for name, p in model.named_parameters() if id(p) not in inside}
    ends = ("embed_tokens", "lm_head", "visual.merger", "visual.patch_embed", "language_model.norm")
    return all(any(end in name for end in ends) for name in outside)


@pytest.mark.parametrize(
    ("recipe", "module", "overlay"),
    [
        ("avar_sft", SFTModule, "lora"),
        ("avar_grpo", GRPOModule, "qlora"),
        pytest.param("avar_sft", SFTModule, "qlora", marks=pytest.mark.slow),
        pytest.param("avar_grpo", GRPOModule, "lora", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_an_overlay_of_both_recipes(recipe, module, overlay):
    cli = build(recipe, overlay)
    assert type(cli.model) is module
    assert cli.model.vlm.lora is not None
    assert (cli.model.vlm.quantization is not None) == (overlay == "qlora")
    assert cli.model.vlm.pretrained == ("demo" if recipe == "avar_sft" else "demo_sft")
