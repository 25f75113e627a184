"""4-bit models against models that hold the same weights as plain floats."""

import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import lightning as L
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from avar_lightning.attention import find_vlm, observe_attention, steer_attention
from avar_lightning.attention.reference import mass_of_probabilities
from avar_lightning.callbacks import VASCallback
from avar_lightning.cli import main
from avar_lightning.grpo import GRPOConfig, GRPOModule
from avar_lightning.guidance import GuidanceConfig, guide
from avar_lightning.merging import merge_adapters
from avar_lightning.model import LoRAConfig, VLMConfig, load_model
from avar_lightning.module import NOT_MODEL_INPUTS, OptimizerConfig
from avar_lightning.processing import DEMO_BASE
from avar_lightning.quantization import QuantizationConfig, keep_layout
from avar_lightning.rewards import VisualAttentionReward
from avar_lightning.roles import Role
from avar_lightning.rollout import SamplingConfig
from avar_lightning.sft import SFTModule
from tests.factories import StopAfter

CONFIGS = Path(__file__).parents[1] / "configs"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
QLORA = VLMConfig("demo", lora=LoRAConfig(r=4, alpha=16), quantization=QuantizationConfig())


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def as_floats(layer):
    """What the packed weights of a layer stand for, in float64, from the definition of NF4 with double quantisation."""
    state, packed = layer.weight.quant_state, layer.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scales = state.absmax
    if state.nested:
        blocks = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code.double()[scales.long()] * blocks + state.offset.double()
    values = state.code.double()[codes] * scales.double().repeat_interleave(state.blocksize)[: len(codes)]
    return values.view(state.shape)


def with_adapters(model, seed=0):
    """Adapters that are not zero, as after some training, the same for every model with these layers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def twin(model, config=QLORA):
    """The same model with plain float64 weights and eager attention: the definition."""
    plain = load_model(replace(config, quantization=None, attn_implementation="eager", gradient_checkpointing=False))
    for name, layer in quantized_layers(model).items():
        plain.get_submodule(name).weight.data.copy_(as_floats(layer))
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    return plain.double()


def inputs_of(batch, dtype=torch.float32):
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.items()
        if name not in NOT_MODEL_INPUTS
    }


@pytest.fixture(scope="module")
def batch(demo_folder):
    from tests.conftest import demo_data

    data = demo_data(demo_folder, batch_size=2)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def eager_masses(model, batch):
    """Masses (L, B, H, N, 2) on image and system tokens from `output_attentions`, and the LM loss."""
    out = model(**inputs_of(batch, torch.float64), use_cache=False, output_attentions=True)
    keys = (int(Role.IMAGE), int(Role.SYSTEM))
    return torch.stack([mass_of_probabilities(p, batch["role_ids"], keys) for p in out.attentions]), out.loss


def guidance_by_hand(masses, batch, config):
    """The forms as the design writes them: means over the queries of each sample, then over layers, heads, samples."""
    roles = batch["role_ids"]
    rows = (roles == int(Role.RESPONSE))[None, :, None, :, None]
    image, system = ((masses * rows).sum(3) / rows.sum(3)).unbind(-1)  # (L, B, H)
    if config.form == "published":
        count = {role: (roles == int(role)).sum(1)[None, :, None] for role in (Role.IMAGE, Role.SYSTEM)}
        enhance = -torch.log(image / count[Role.IMAGE] + 1e-6)
        suppress = torch.log(system / count[Role.SYSTEM] + 1e-6)
        return (config.alpha * enhance + config.beta * suppress).mean()
    share = image / (image + system)
    return config.weight * (-share.log() if config.form == "share" else torch.relu(config.target - share)).mean()


@pytest.mark.parametrize(
    ("form", "checkpointing"),
    [
        ("share", True),
        *(
            pytest.param(form, checkpointing, marks=pytest.mark.slow)
            for form, checkpointing in product(("published", "share", "hinge"), (False, True))
            if (form, checkpointing) != ("share", True)
        ),
    ],
)
def test_masses_and_gradients_are_those_of_the_same_weights_in_float64(batch, form, checkpointing):
    guidance = GuidanceConfig(form=form, target=0.95, alpha=0.4, beta=0.3, weight=0.7)
    model = with_adapters(load_model(replace(QLORA, gradient_checkpointing=checkpointing)))
    definition = twin(model)
    model.train()
    with observe_attention(model, batch["role_ids"], queries=guidance.query_roles) as record:
        loss_lm = model(**inputs_of(batch), use_cache=False).loss
    guided = guide(record, guidance).loss
    (loss_lm + guided).backward()
    masses, expected_lm = eager_masses(definition, batch)
    expected = guidance_by_hand(masses, batch, guidance)
    (expected_lm + expected).backward()
    rows = (batch["role_ids"] == int(Role.RESPONSE))[None, :, None, :, None]
    recorded = torch.stack([record.mass[layer] for layer in sorted(record.mass)])
    torch.testing.assert_close((recorded * rows).double(), masses * rows, rtol=1e-4, atol=1e-5)
    assert guided.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss_lm.item() == pytest.approx(expected_lm.item(), rel=1e-4)
    theirs = dict(definition.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = theirs[name].grad.abs().max()
            assert scale > 0
            torch.testing.assert_close(parameter.grad.double(), theirs[name].grad, rtol=1e-3, atol=1e-3 * scale.item())
            compared += 1
        else:
            assert parameter.grad is None
    assert compared == 4 * 7 * 2  # the down projections have adapters too


def test_only_the_language_model_is_in_4_bits():
    model, whole = load_model(QLORA), load_model("demo")
    own = {name.replace(".base_layer", ""): p for name, p in find_vlm(model).named_parameters() if "lora_" not in name}
    linear = {
        f"{n}.weight" for n, m in whole.named_modules() if "language_model" in n and isinstance(m, torch.nn.Linear)
    }
    # Rows of 352 weights are no whole blocks of 64, which bitsandbytes reads wrongly on a CPU.
    linear -= {name for name in linear if "down_proj" in name}
    assert len(linear) == 4 * 6
    for name, parameter in whole.named_parameters():
        if name in linear:
            assert own[name].dtype == torch.uint8
            assert own[name].numel() == parameter.numel() // 2
        else:
            assert torch.equal(own[name], parameter)
    layer = quantized_layers(model)["base_model.model.model.language_model.layers.1.mlp.up_proj.base_layer"]
    error = as_floats(layer) - whole.get_submodule("model.language_model.layers.1.mlp.up_proj").weight
    # The widest gap between two values of NF4 is 0.304 of a block's largest weight, double quantisation adds a little.
    assert 0 < error.abs().max() < 0.16 * whole.get_submodule("model.language_model.layers.1.mlp.up_proj").weight.max()


def test_rows_that_are_no_whole_blocks_stay_and_that_is_said():
    with pytest.warns(UserWarning, match=r"4 of 28 linear layers .*down_proj, 352 weights a row\) keep torch.float32"):
        load_model(QLORA, on_meta=True)


@pytest.mark.slow
def test_what_is_skipped_stays_as_it_was():
    skipping = load_model(replace(QLORA, quantization=QuantizationConfig(skip=[r"layers\.0\.", "o_proj$"])))
    names = set(quantized_layers(skipping))
    assert names == {n for n in quantized_layers(load_model(QLORA)) if ".layers.0." not in n and "o_proj" not in n}
    own, whole = find_vlm(skipping).get_decoder(), load_model("demo").get_decoder()
    assert torch.equal(own.layers[0].mlp.up_proj.weight, whole.layers[0].mlp.up_proj.weight)


@pytest.mark.slow
def test_what_does_not_train_has_the_dtype_asked_for_and_adapters_are_float32():
    model = load_model(replace(QLORA, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.uint8, torch.bfloat16}
    assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_on_meta_it_has_the_shapes_that_it_will_have(dtype):
    config = replace(QLORA, dtype=dtype, quantization=QuantizationConfig(skip=["o_proj"]))
    of = [
        {n: (p.shape, p.dtype, p.requires_grad) for n, p in load_model(config, on_meta=blank).named_parameters()}
        for blank in (False, True)
    ]
    assert of[0] == of[1]
    blank = load_model(config, on_meta=True)
    assert {tensor.device.type for tensor in [*blank.parameters(), *blank.buffers()]} == {"meta"}


@pytest.mark.slow
def test_random_weights_can_be_quantised():
    torch.manual_seed(3)
    whole = load_model(VLMConfig("demo", from_scratch=True))
    torch.manual_seed(3)
    model = load_model(replace(QLORA, from_scratch=True))
    layer = quantized_layers(model)["base_model.model.model.language_model.layers.2.mlp.up_proj.base_layer"]
    weight = whole.get_submodule("model.language_model.layers.2.mlp.up_proj").weight
    assert torch.nn.functional.cosine_similarity(as_floats(layer).flatten(), weight.double().flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora": None}, "vlm.quantization is set and vlm.lora is not, expected both"),
        ({"quantization": {"skip": ["vizual"]}}, r"'vizual' matches no linear layer"),
        ({"quantization": {"skip": ["_proj"]}}, "leaves none of the 28 linear layers"),
    ],
)
def test_what_makes_no_sense_is_said(config, words):
    with pytest.raises(ValueError, match=words):
        load_model(replace(QLORA, **config))


def test_without_bitsandbytes_the_command_to_install_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'avar-lightning\[qlora\]'"):
        load_model(QLORA)


def make_module(**options):
    torch.manual_seed(7)
    return SFTModule(replace(QLORA, **options), GuidanceConfig(), OptimizerConfig(lr=1e-3))


def fit(module, data, steps, ckpt_path=None, **options):
    options = QUIET | {"max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": False} | options
    trainer = L.Trainer(**options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.values.append(outputs["loss"].item())


def test_sharing_4_bit_weights_is_refused(make_data):
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy, which cannot share 4-bit weights .* expected ddp"):
        fit(make_module(), make_data(), 1, strategy=strategy, devices=1)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_losses_from_adapters_alone(make_data, tmp_path):
    whole, first, second = Losses(), Losses(), Losses()
    data = {"batch_size": 2}
    module = make_module()
    module.configure_model()
    packed = {name: layer.weight.data.clone() for name, layer in quantized_layers(module).items()}
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    fit(module, make_data(**data), 4, callbacks=[whole])
    assert all(torch.equal(layer.weight.data, packed[name]) for name, layer in quantized_layers(module).items())
    moved = [not torch.equal(p, start[name]) for name, p in module.named_parameters() if p.requires_grad]
    assert len(moved) == 56
    assert all(moved)

    trainer = fit(make_module(), make_data(**data), 4, callbacks=[first, StopAfter(2)])
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=False)["state_dict"]
    assert state.keys() == start.keys()  # the base is not written again
    fit(make_module(), make_data(**data), 4, ckpt_path=path, callbacks=[second])
    assert first.values + second.values == whole.values


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_an_error(make_data, tmp_path):
    trainer = fit(make_module(), make_data(batch_size=2), 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    opened = SFTModule.load_from_checkpoint(tmp_path / "one.ckpt", map_location="cpu", weights_only=False)
    for name, parameter in trainer.lightning_module.named_parameters():
        assert torch.equal(parameter, opened.get_parameter(name))
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=False)
    lost = next(iter(checkpoint["state_dict"]))
    del checkpoint["state_dict"][lost]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=lost):
        SFTModule.load_from_checkpoint(tmp_path / "less.ckpt", weights_only=False)
    other = replace(QLORA, lora=LoRAConfig(r=5))
    with pytest.raises(ValueError, match="does not fit"):
        SFTModule.load_from_checkpoint(tmp_path / "one.ckpt", vlm=other, weights_only=False)


@pytest.mark.slow
def test_random_weights_in_4_bits_are_not_kept_and_that_is_said(make_data, tmp_path):
    trainer = fit(make_module(from_scratch=True), make_data(batch_size=2), 1)
    with pytest.raises(ValueError, match="random weights that no checkpoint keeps"):
        trainer.save_checkpoint(tmp_path / "one.ckpt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A 4-bit model with adapters, and the folder that it wrote."""
    module = make_module()
    module.configure_model()
    with_adapters(module.model.eval())
    return module, module.save_pretrained(tmp_path_factory.mktemp("export"))


def logits(model, batch):
    with torch.no_grad():
        return model(**inputs_of(batch, next(model.parameters()).dtype), use_cache=False).logits


@pytest.mark.slow
def test_peft_opens_the_adapters_on_either_base(exported, batch):
    module, folder = exported
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (folder / "model.safetensors").exists()
    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=[".*visual.*", ".*lm_head", ".*down_proj"],
    )
    for options in ({"quantization_config": in_4_bits, "device_map": "cpu"}, {}):
        base = AutoModelForImageTextToText.from_pretrained(DEMO_BASE, **options)
        keep_layout(base)  # or a CPU with bfloat16 instructions evaluates in bfloat16
        opened = PeftModel.from_pretrained(base, folder).eval()
        for name, parameter in opened.named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, module.model.get_parameter(name))
        if options:
            torch.testing.assert_close(logits(opened, batch), logits(module.model, batch))
        else:
            assert not torch.allclose(logits(opened, batch), logits(module.model, batch), rtol=1e-3, atol=1e-3)


def base_plus_adapters(module):
    """Full-precision weights plus scaled products of the adapters, by hand, in float64."""
    whole = load_model("demo").double()
    lora = module.vlm.lora
    for name, layer in module.model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            weight = whole.get_submodule(name.removeprefix("base_model.model.")).weight
            weight.data += lora.alpha / lora.r * b @ a
    return whole


@pytest.mark.slow
def test_merging_never_rounds_to_4_bits(exported, batch):
    module, folder = exported
    wanted = base_plus_adapters(module)
    state = {f"model.{name}": p.detach() for name, p in module.model.named_parameters() if "lora_" in name}
    for source in (folder, str(folder), state):
        merged = merge_adapters(source, module.vlm)
        assert type(merged) is type(wanted)
        assert merged.state_dict().keys() == wanted.state_dict().keys()
        for name, weight in merged.state_dict().items():
            torch.testing.assert_close(weight.double(), wanted.state_dict()[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(logits(merged, batch).double(), logits(wanted, batch), rtol=1e-4, atol=1e-4)
    # PEFT's own merge into the 4-bit model rounds the sum again.
    rounded = with_adapters(load_model(QLORA)).merge_and_unload()
    here, there = (logits(m, batch).double() - logits(wanted, batch) for m in (merged, rounded))
    assert there.abs().max() > 100 * here.abs().max()


@pytest.mark.slow
def test_a_merged_model_is_a_plain_one(exported, tmp_path, batch):
    _, folder = exported
    merged = merge_adapters(folder, "demo", dtype="bfloat16")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    merged.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    assert not (tmp_path / "adapter_config.json").exists()
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(opened, batch), logits(merged, batch))


@pytest.mark.slow
def test_adapters_that_do_not_fit_the_base_are_not_merged(exported, tmp_path):
    module, folder = exported
    state = {f"model.{name}": p.detach() for name, p in module.model.named_parameters() if "lora_" in name}
    lost = state.popitem()[0]
    with pytest.raises(ValueError, match=rf"{lost.split('.')[-4]}.*missing, unknown or of another shape"):
        merge_adapters(state, module.vlm)
    with pytest.raises(ValueError, match=r"56 adapters .* another shape"):
        merge_adapters(folder, write_narrow_base(tmp_path))
    with pytest.raises(ValueError, match=r"vlm\.lora is not set"):
        merge_adapters(state, "demo")
    with pytest.raises(FileNotFoundError, match="No adapters at"):
        merge_adapters(tmp_path / "none", "demo")


def write_narrow_base(folder):
    """The demo with narrower layers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(DEMO_BASE)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 64
    config.text_config.intermediate_size = 96
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_steering_and_measuring_see_the_4_bit_weights(batch):
    model = with_adapters(load_model(QLORA))
    definition, outputs = twin(model), []
    for either in (model, definition):
        dtype = torch.float64 if either is definition else torch.float32
        with torch.no_grad(), steer_attention(either, batch["role_ids"], image=0.5, system=0.7, mode="mass"):
            outputs.append(either(**inputs_of(batch, dtype), use_cache=False).logits.double())
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_vas_in_validation_is_that_of_the_same_weights(make_data, tmp_path):
    module = make_module()
    module.configure_model()
    definition = make_module()
    definition.model = twin(with_adapters(module.model)).float()
    definition.vectors = set()
    measured = [
        L.Trainer(**QUIET, default_root_dir=tmp_path / name, callbacks=[VASCallback()]).validate(
            m, make_data(), verbose=False
        )[0]
        for name, m in {"quantised": module, "definition": definition}.items()
    ]
    names = {"val/vas", "val/vas_response", "val/image_share_response", "val/loss"}
    assert names <= measured[0].keys()
    for name in names:
        assert measured[0][name] == pytest.approx(measured[1][name], rel=1e-3)


@pytest.mark.slow
def test_reinforcement_learning_compares_with_the_base_under_the_adapters(make_data):
    torch.manual_seed(7)
    module = GRPOModule(
        VLMConfig("demo_sft", lora=QLORA.lora, quantization=QuantizationConfig()),
        GRPOConfig(num_generations=4, micro_batch_size=4, beta=0.1, num_minibatches=2),
        SamplingConfig(max_new_tokens=12),
        visual=VisualAttentionReward(transform="share", weight=0.3),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    module.configure_model()
    assert not hasattr(module, "reference")
    with_adapters(module.model)
    packed = {name: layer.weight.data.clone() for name, layer in quantized_layers(module).items()}
    trainer = fit(module, make_data(batch_size=2, train_prompts=True), 2, log_every_n_steps=1)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/kl"] > 0
    assert all(torch.equal(layer.weight.data, packed[name]) for name, layer in quantized_layers(module).items())
    rollouts = module.rollouts
    bare = twin(module.model, module.vlm)
    with bare.disable_adapter():
        for index in range(len(rollouts)):
            row = module._batch(rollouts, [index])
            with torch.no_grad():
                inputs = {k: v.double() if v.is_floating_point() else v for k, v in row.inputs.items()}
                tokens = rollouts.token_ids[index]
                found = bare(**inputs, use_cache=False).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
            expected = found.gather(1, torch.as_tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(rollouts.ref_logps[index].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["avar_sft", "avar_grpo"])
def test_the_overlay_trains_the_demo_and_goes_on(tmp_path, recipe):
    data = {"folder": tmp_path / "data", "num_train": 16, "num_val": 4, "batch_size": 4, "num_workers": 0}
    arguments = ["fit", f"--config={CONFIGS / recipe}.yaml", f"--config={CONFIGS / 'qlora.yaml'}"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.val_check_interval=2", "--model.init_args.max_new_tokens=4"]
    arguments += [f"--trainer.logger.init_args.save_dir={tmp_path}"]
    arguments += [f"--data.init_args.{name}={value}" for name, value in data.items()]
    if recipe == "avar_grpo":
        arguments += ["--model.init_args.sampling.max_new_tokens=8", "--model.init_args.grpo.num_generations=4"]
    assert main([*arguments, "--trainer.max_steps=2"]) == 0
    folder = tmp_path / recipe / "version_0"
    last = folder / "checkpoints" / "last.ckpt"
    assert main([*arguments, "--trainer.max_steps=4", f"--ckpt_path={last}"]) == 0
    assert (tmp_path / recipe / "version_1" / "hf").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "qwen2_vl",
        "qwen3_vl",
        "llava",
        "llava_next",
        "llava_onevision",
        "internvl",
        "gemma3",
        "smolvlm",
        "mistral3",
        "mllama",
    ],
)
def test_every_family_has_its_language_model_in_4_bits_and_nothing_else(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    whole = load_model(VLMConfig(str(tmp_path)), on_meta=True)
    model = find_vlm(load_model(replace(QLORA, pretrained=str(tmp_path)), on_meta=True))
    linear = {n for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear)}
    outside = "vision|visual|projector|connector|lm_head"
    expected = {name for name in linear if not re.search(outside, name)}
    assert expected
    assert {name.replace(".base_layer", "") for name in quantized_layers(model)} == expected
    shapes = {n: p.shape for n, p in whole.named_parameters() if n.removesuffix(".weight") not in expected}
    own = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    assert {n: own[n].shape for n in shapes} == shapes
    assert not any(p.requires_grad for p in own.values())
