from types import SimpleNamespace

import lightning as L
import pytest
import torch
from transformers import AutoModelForImageTextToText

from avar_lightning.attention import observe_attention
from avar_lightning.guidance import GuidanceConfig, guide
from avar_lightning.model import LoRAConfig, VLMConfig
from avar_lightning.module import NOT_MODEL_INPUTS, OptimizerConfig
from avar_lightning.roles import Role
from avar_lightning.sft import SFTModule
from tests.factories import StopAfter

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def make_module(guidance=None, lora=None, max_new_tokens=0, **vlm):
    torch.manual_seed(7)
    config = VLMConfig("demo", from_scratch=True, lora=lora, **vlm)
    return SFTModule(config, guidance or GuidanceConfig(), OptimizerConfig(lr=1e-3), max_new_tokens)


def fit(module, data, steps=3, **options):
    options = QUIET | {"max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": False} | options
    trainer = L.Trainer(**options)
    trainer.fit(module, data, ckpt_path=options.pop("ckpt_path", None))
    return trainer


def state(module):
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hand_written_sft(data, steps=3):
    """Plain SFT as one would write it without this project."""
    module = make_module(GuidanceConfig(form="none"))
    module.configure_model()
    model = module.model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    # No warm-up in so few steps; a cosine from 1 to 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64)).item())
    )
    for batch, _ in zip(data.train_dataloader(), range(steps)):
        inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return state(module)


def test_without_weight_it_is_plain_sft(make_data):
    plain = make_module(GuidanceConfig(form="none"))
    fit(plain, make_data())
    reference = hand_written_sft(make_data())
    for name, tensor in state(plain).items():
        # Another order of sums, where Adam divides small by small; a step is 1e-3.
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=5e-5)
    for guidance in (GuidanceConfig(form="share", weight=0.0), GuidanceConfig(form="published", alpha=0.0, beta=0.0)):
        module = make_module(guidance)
        fit(module, make_data())
        assert same(state(module), state(plain))


@pytest.mark.parametrize("form", ["published", "share", "hinge"])
def test_loss_is_lm_plus_guidance_and_both_are_logged(make_data, form):
    config = GuidanceConfig(form=form, target=0.95)
    module = make_module(config)
    trainer = fit(module, make_data(), steps=1, log_every_n_steps=1)
    fresh = make_module(config)
    fresh.configure_model()
    batch = next(iter(make_data().train_dataloader()))
    with observe_attention(fresh.model, batch["role_ids"], queries=config.query_roles) as record:
        loss_lm = fresh(batch).loss
    expected = loss_lm + guide(record, config).loss
    logged = trainer.callback_metrics
    assert logged["train/loss_lm"].item() == pytest.approx(loss_lm.item(), rel=1e-5)
    assert logged["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    parts = {"published": ["loss_enhance_img", "loss_suppress_sys"]}.get(form, ["loss_share"])
    assert {
        f"train/{name}" for name in [*parts, "mass_image", "mass_system", "image_share", "vas_ratio_of_means"]
    } <= logged.keys()


def test_gradients_do_not_depend_on_checkpointing(make_data):
    batch = next(iter(make_data().train_dataloader()))
    gradients = []
    for checkpointing in (False, True):
        module = make_module(
            GuidanceConfig(form="published", queries=["user", "response"]), gradient_checkpointing=checkpointing
        )
        module.configure_model()
        with observe_attention(module.model, batch["role_ids"], queries=module.guidance.query_roles) as record:
            loss = module(batch).loss
        (loss + guide(record, module.guidance).loss).backward()
        gradients.append([p.grad for p in module.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_is_refused(make_data):
    module = make_module()
    module.configure_model()
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    module.model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        fit(module, make_data(), steps=1)


def test_lora_moves_adapters_and_nothing_else(make_data):
    module = make_module(lora=LoRAConfig(r=4))
    module.configure_model()
    before = state(module)
    fit(module, make_data(), steps=2)
    changed = {name for name, tensor in state(module).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_one_large_batch_equals_accumulated_small_ones(make_data):
    """Samples of equal length, so that the mean over tokens is the mean over batches."""
    import itertools

    batch = next(iter(make_data(batch_size=64).train_dataloader()))
    module = make_module(GuidanceConfig(form="share", weight=1.0))
    module.configure_model()

    def gradient(rows):
        num_patches = batch["pixel_values"].shape[0] // 64
        part = {name: value[rows] for name, value in batch.items() if torch.is_tensor(value) and name != "pixel_values"}
        part["pixel_values"] = torch.cat([batch["pixel_values"][r * num_patches : (r + 1) * num_patches] for r in rows])
        module.zero_grad()
        with observe_attention(module.model, part["role_ids"], queries=module.guidance.query_roles) as record:
            module(part)
        guide(record, module.guidance).loss.backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None and p.grad.any()]

    whole = gradient(list(range(8)))
    small = [gradient([row]) for row in range(8)]
    for grad, parts in itertools.zip_longest(whole, zip(*small)):
        torch.testing.assert_close(grad, sum(parts) / 8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_no_forward_lies_beside_gradients_that_were_applied(make_data, accumulated):
    class Watch(L.Callback):
        def __init__(self):
            self.before, self.after = [], []

        def on_train_start(self, trainer, module):
            module.model.register_forward_pre_hook(lambda *_: self.before.append(has_gradients(module)))

        def on_train_batch_end(self, trainer, module, *_):
            self.after.append(has_gradients(module))

    def has_gradients(module):
        return any(parameter.grad is not None for parameter in module.parameters())

    watch = Watch()
    fit(make_module(), make_data(), steps=2, accumulate_grad_batches=accumulated, callbacks=[watch])
    assert watch.before == ([False, True] * 2 if accumulated == 2 else [False, False])
    assert all(watch.after)


def test_resumed_run_equals_uninterrupted_one(make_data, tmp_path):
    whole = make_module()
    fit(whole, make_data(), steps=4)
    trainer = fit(make_module(), make_data(), steps=4, callbacks=[StopAfter(2)])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_module()
    L.Trainer(**QUIET, max_steps=4, limit_val_batches=0, enable_checkpointing=False).fit(
        resumed, make_data(), ckpt_path=tmp_path / "half.ckpt"
    )
    for name, tensor in state(resumed).items():
        torch.testing.assert_close(tensor, state(whole)[name], rtol=1e-5, atol=1e-7)


def test_checkpoint_and_export_open_again(make_data, tmp_path):
    module = make_module()
    trainer = fit(module, make_data(), steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "one.ckpt", map_location="cpu")
    assert same(state(loaded), state(module))
    assert loaded.guidance == module.guidance
    exported = AutoModelForImageTextToText.from_pretrained(module.save_pretrained(tmp_path / "hf"))
    batch = next(iter(make_data().train_dataloader()))
    inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(**inputs).logits, module(batch).logits)
    assert "avar" not in (tmp_path / "hf" / "config.json").read_text()


def test_validation_logs_loss_and_accuracy(make_data, monkeypatch):
    module = make_module(max_new_tokens=4)
    gold = [columns["answer"] for batch in make_data().val_dataloader() for columns in batch["columns"]]
    answers = iter([f"<answer>{answer}</answer>" for answer in gold[:7]] + ["<answer>no such</answer>"] * 3)
    generated = []

    def generate(batch):
        generated.extend(SFTModule.generate(module, batch))
        return [next(answers) for _ in batch["columns"]]

    monkeypatch.setattr(module, "generate", generate)
    metrics = L.Trainer(**QUIET).validate(module, make_data(), verbose=False)[0]
    assert metrics["val/accuracy"] == pytest.approx(0.7)
    assert len(generated) == 10
    total = count = 0
    for batch in make_data().val_dataloader():
        labels = batch["labels"][:, 1:]
        logits = module(batch).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        total, count = total + loss.item(), count + (labels != -100).sum().item()
    assert metrics["val/loss"] == pytest.approx(total / count, rel=1e-4)


def test_generation_never_samples_a_placeholder(make_data):
    module = make_module(max_new_tokens=5)
    module.configure_model()
    module.eval()
    image = module.processor.image_token_id
    batch = next(iter(make_data().val_dataloader()))
    with torch.no_grad():  # make the placeholder by far the likeliest token
        embedding = module.model.get_input_embeddings().weight
        embedding.zero_()
        module.model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(embedding))
        module.model.lm_head.register_forward_hook(lambda *a: a[2].index_fill(-1, torch.tensor([image]), 100.0))
    assert all("<|image_pad|>" not in text for text in module.generate(batch))


def test_endless_schedule_is_refused(make_data):
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        fit(make_module(), make_data(), steps=-1, max_epochs=-1)


def test_guidance_that_never_applies_stops_the_run(make_data, monkeypatch):
    monkeypatch.setattr("avar_lightning.sft.PATIENCE", 2)
    module = make_module()

    class WithoutSystem(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch["role_ids"][batch["role_ids"] == Role.SYSTEM] = Role.OTHER

    with pytest.raises(ValueError, match="no sample to guide in 2 logged batches"):
        fit(module, make_data(), steps=4, log_every_n_steps=1, callbacks=[WithoutSystem()])


def test_samples_without_answers_cannot_be_scored(make_data):
    module = make_module(max_new_tokens=1)
    module.configure_model()
    with pytest.raises(ValueError, match="has an 'answer'"):
        module._score(["a", "b"], [{"answer": None}, {}])
    module._score(["<answer>1</answer>", "?"], [{"answer": 1}, {"answer": None}])
    module._score(["?"], [{"answer": 1, "repeated": True}])
    assert module.accuracy.compute() == 1.0


def test_weight_decay_spares_vectors(make_data):
    module = make_module()
    trainer = fit(module, make_data(), steps=1)
    decayed, spared = trainer.optimizers[0].param_groups
    assert {p.ndim for p in spared["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)


def test_a_test_logs_under_its_own_name_with_the_data_modules_processor(make_data):
    module, data = make_module(max_new_tokens=1), make_data()
    trainer = L.Trainer(**QUIET)
    trainer.test(module, data, verbose=False)
    assert {"test/loss", "test/accuracy"} <= trainer.callback_metrics.keys()
    assert module.processor is data.processor  # exported with the model, its limits on pixels included


def test_layers_that_would_be_cut_are_refused():
    module = make_module()
    module._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match=r"tensor_parallel_size 2, expected 1.*--trainer\.strategy fsdp2"):
        module.load()


def test_a_checkpoint_of_another_training_is_refused():
    module = make_module()
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    with pytest.raises(ValueError, match=r"one of grpo, and sft cannot go on.*avar export"):
        module.on_load_checkpoint({"stage": "grpo"})
