"""`steer_attention` through a whole Qwen2.5-VL, against an eager float64 model written from the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tests.attention.test_registry  # registers fake_flash_attention_2  # noqa: F401
from avar_lightning.attention import observe_attention, select_layers, steer_attention
from avar_lightning.attention.reference import mass_of_probabilities
from avar_lightning.attention.steering import MODES
from avar_lightning.roles import Role
from tests.attention.oracle import Growing, Steered, expected, oracle
from tests.factories import IMAGE_TOKEN, VISION_END, VISION_START, Batch, Conversation, make_batch, tiny_vlm

EVERY_ROLE = tuple(Role)
KEYS = (Role.IMAGE, Role.SYSTEM, Role.USER)
MIXED = (Conversation(), Conversation(images=2, after=1), Conversation(system=0, images=0))
ATTN = ["sdpa", "eager", "fake_flash_attention_2"]
ROWS: dict[str, Any] = {"every": None, "text": (Role.USER, Role.RESPONSE), "last": "last"}


def with_attn(model: PreTrainedModel, attn: str) -> PreTrainedModel:
    model.set_attn_implementation({"text_config": attn})
    return model


def rows_of(batch: Batch, queries: Any) -> Tensor | None:
    """The steered rows (B, N), found without the code under test."""
    if queries is None:
        return None
    if queries == "last":
        last = [int(mask.nonzero().max()) for mask in batch.inputs["attention_mask"]]
        return torch.nn.functional.one_hot(torch.tensor(last), batch.role_ids.shape[1]).bool()
    return sum((batch.role_ids == role for role in queries), torch.zeros_like(batch.role_ids)).bool()


def assert_matches(
    model: PreTrainedModel, batch: Batch, steered: Steered, queries: Any = None, **where: Any
) -> tuple[Tensor, Tensor]:
    """Logits of real tokens and masses of real rows are the oracle's; returns both."""
    real = batch.inputs["attention_mask"].bool()
    logits, masses = expected(tiny_vlm, batch.inputs, steered, KEYS)
    arguments = {"image": steered.image, "system": steered.system, "mode": steered.mode, "queries": queries} | where
    with (
        torch.no_grad(),
        observe_attention(model, batch.role_ids, queries=EVERY_ROLE, keys=KEYS) as record,
        steer_attention(model, batch.role_ids, **arguments),
    ):
        out = model(**batch.inputs)
    torch.testing.assert_close(out.logits[real].double(), logits[real], rtol=1e-3, atol=2e-4)
    rows = real[None, :, None, :, None]
    torch.testing.assert_close(record.stacked().double() * rows, masses * rows, rtol=1e-4, atol=1e-5)
    return out.logits, record.stacked()


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attn", ATTN)
def test_every_kernel_mode_and_row_set(attn: str, mode: Any, rows: str, padding_side: str) -> None:
    batch = make_batch(*MIXED, padding_side=padding_side)
    steered = Steered(batch.role_ids, 0.5, 0.7, mode, rows=rows_of(batch, ROWS[rows]))
    model = with_attn(tiny_vlm(), attn)
    with torch.no_grad():
        plain = model(**batch.inputs).logits
    logits, _ = assert_matches(model, batch, steered, ROWS[rows])
    assert not torch.allclose(logits, plain, atol=1e-2)  # it did something
    with torch.no_grad():
        assert model(**batch.inputs).logits.equal(plain)  # and is gone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("image", "system"), [(-0.5, -1.0), (2.0, 0.0), (0.0, 1.0), (-1.0, 1.0)])
def test_every_sign_of_strength(mode: Any, image: float, system: float) -> None:
    batch = make_batch(*MIXED)
    _, masses = assert_matches(tiny_vlm(), batch, Steered(batch.role_ids, image, system, mode))
    if mode == "mass" and system == 1.0:
        assert masses[..., 1][:, :2].eq(0).sum() > masses[..., 1][:, :2].numel() / 2


@pytest.mark.parametrize("mode", MODES)
def test_layers_and_heads(mode: Any) -> None:
    batch = make_batch(*MIXED)
    one = Steered(batch.role_ids, 0.5, 0.7, mode, layers=[1])
    for layers in ([1], "1", "0.5-1.0"):
        assert_matches(tiny_vlm(), batch, one, layers=layers)
    heads = {0: [3], 1: [0, 2]}
    assert_matches(tiny_vlm(), batch, Steered(batch.role_ids, 0.5, 0.7, mode, heads=heads), heads=heads)
    rows = rows_of(batch, ROWS["text"])
    both = Steered(batch.role_ids, 0.5, 0.7, mode, rows=rows, heads=heads)
    assert_matches(tiny_vlm(), batch, both, ROWS["text"], heads=heads)


def test_eager_returns_the_steered_probabilities() -> None:
    batch = make_batch(*MIXED)
    for mode in MODES:
        for rows in ROWS.values():
            steered = Steered(batch.role_ids, 0.5, 0.7, mode, rows=rows_of(batch, rows))
            _, masses = expected(tiny_vlm, batch.inputs, steered, KEYS)
            model = tiny_vlm("eager")
            with (
                torch.no_grad(),
                steer_attention(model, batch.role_ids, image=0.5, system=0.7, mode=mode, queries=rows),
            ):
                attentions = model(**batch.inputs, output_attentions=True).attentions
            real = batch.inputs["attention_mask"].bool()[None, :, None, :, None]
            ours = torch.stack([mass_of_probabilities(a, batch.role_ids, KEYS) for a in attentions])
            torch.testing.assert_close(ours.double() * real, masses * real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn", ATTN)
def test_strength_zero_is_the_identity(attn: str) -> None:
    batch = make_batch(*MIXED)
    model = with_attn(tiny_vlm(), attn)
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        for mode in MODES:
            with steer_attention(model, batch.role_ids, image=0.0, system=0.0, mode=mode):
                assert model(**batch.inputs).logits.equal(plain)


def test_an_exception_ends_it() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with pytest.raises(KeyError), steer_attention(model, batch.role_ids):
            raise KeyError
        assert model(**batch.inputs).logits.equal(plain)


PLACEHOLDERS = (IMAGE_TOKEN, VISION_START, VISION_END)
PROMPTS = (Conversation(response=0), Conversation(response=0, images=2, after=1))


GENERATION = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "suppress_tokens": list(PLACEHOLDERS)}


def steered_generation(model: PreTrainedModel, batch: Batch, mode: Any, queries: Any, **kwargs: Any) -> Any:
    with (
        observe_attention(model, batch.role_ids, queries=EVERY_ROLE, keys=KEYS) as record,
        steer_attention(model, batch.role_ids, image=0.5, system=0.7, mode=mode, queries=queries),
    ):
        tokens = model.generate(**batch.inputs, **GENERATION, **kwargs)
    return record, tokens


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mode", MODES)
def test_generation_is_one_steered_forward(mode: Any, rows: str, cache: str | None) -> None:
    batch = make_batch(*PROMPTS, padding_side="left")
    record, tokens = steered_generation(tiny_vlm(), batch, mode, ROWS[rows], cache_implementation=cache)
    ids = tokens[:, :-1]
    extra = ids.shape[1] - batch.role_ids.shape[1]
    pad = torch.nn.functional.pad
    inputs = batch.inputs | {
        "input_ids": ids,
        "attention_mask": pad(batch.inputs["attention_mask"], (0, extra), value=1),
        "mm_token_type_ids": pad(batch.inputs["mm_token_type_ids"], (0, extra)),
    }
    whole = Batch(inputs, pad(batch.role_ids, (0, extra), value=int(Role.RESPONSE)))
    selected = rows_of(whole, ROWS[rows])
    if rows == "last":
        selected[:, -extra - 1 :] = True  # each generated row was the last of its forward
    steered = Steered(whole.role_ids, 0.5, 0.7, mode, rows=selected)
    logits, masses = expected(tiny_vlm, whole.inputs, steered, KEYS)
    logits[..., list(PLACEHOLDERS)] = -torch.inf
    assert logits[:, -extra - 1 :].argmax(-1).equal(tokens[:, -extra - 1 :])
    real = whole.inputs["attention_mask"].bool()[None, :, None, :, None]
    torch.testing.assert_close(record.stacked().double() * real, masses * real, rtol=1e-3, atol=1e-5)


def test_beams_are_steered() -> None:
    batch = make_batch(*PROMPTS, padding_side="left")
    model = tiny_vlm()
    plain = model.generate(**batch.inputs, **GENERATION, num_beams=3)
    record, tokens = steered_generation(model, batch, "mass", None, num_beams=3)
    assert record.role_ids.shape[0] == 6
    assert not tokens.equal(plain)
    # Without a cache, each step is a forward over the whole beam by the oracle.
    twin = with_attn(tiny_vlm(), "oracle")
    growing: Any = Growing(batch.role_ids.repeat_interleave(3, dim=0), twin)
    with oracle(Steered(growing, 0.5, 0.7, "mass")):
        assert twin.generate(**batch.inputs, **GENERATION, num_beams=3, use_cache=False).equal(tokens)


def test_bfloat16_is_no_worse_than_eager_in_bfloat16() -> None:
    batch = make_batch(*MIXED)
    real = batch.inputs["attention_mask"].bool()
    for mode in MODES:
        exact, _ = expected(tiny_vlm, batch.inputs, Steered(batch.role_ids, 0.5, 0.7, mode), KEYS)
        errors = []
        for attn in ("sdpa", "eager"):
            model = with_attn(tiny_vlm(dtype=torch.bfloat16), attn)
            with torch.no_grad(), steer_attention(model, batch.role_ids, image=0.5, system=0.7, mode=mode):
                errors.append((model(**batch.to(torch.bfloat16).inputs).logits.double() - exact)[real].abs().mean())
        plain = (tiny_vlm(dtype=torch.bfloat16)(**batch.to(torch.bfloat16).inputs).logits.double())[real]
        unsteered = (plain - tiny_vlm()(**batch.inputs).logits[real]).abs().mean()
        assert errors[0] <= 2 * max(errors[1], unsteered)


def test_trained_adapters_are_steered() -> None:
    batch = make_batch(*MIXED)
    torch.manual_seed(1)
    wrapped = get_peft_model(tiny_vlm(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with torch.no_grad(), steer_attention(wrapped, batch.role_ids, image=0.5, system=0.7):
        adapted = wrapped.eval()(**batch.inputs).logits
    merged = wrapped.merge_and_unload()
    with torch.no_grad(), steer_attention(merged, batch.role_ids, image=0.5, system=0.7):
        torch.testing.assert_close(merged(**batch.inputs).logits, adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_steering_are_the_oracle_s(mode: Any, checkpointing: bool) -> None:
    batch = make_batch(*MIXED)
    model, twin = tiny_vlm(), with_attn(tiny_vlm(dtype=torch.float64), "oracle")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    real = batch.inputs["attention_mask"].bool()
    text = rows_of(batch, ROWS["text"])
    weights = torch.tensor([-1.0, 0.5, 1.0])
    with (
        observe_attention(model, batch.role_ids, queries=ROWS["text"], keys=KEYS) as record,
        steer_attention(model, batch.role_ids, image=0.5, system=0.7, mode=mode, queries=ROWS["text"]),
    ):
        out = model(**batch.inputs).logits
    (out[real].square().mean() + (record.stacked() * weights).mean()).backward()
    with oracle(Steered(batch.role_ids, 0.5, 0.7, mode, rows=text)):
        theirs = twin(**batch.to(torch.float64).inputs, output_attentions=True)
    masses = torch.stack([mass_of_probabilities(a, batch.role_ids, KEYS) for a in theirs.attentions])
    masses = masses * text[None, :, None, :, None]
    (theirs.logits[real].square().mean() + (masses * weights).mean()).backward()
    for (name, ours), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(ours.grad.double(), other.grad, rtol=2e-3, atol=2e-4, msg=name)


def test_contexts_on_different_layers_add_up_and_on_the_same_are_refused() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    with torch.no_grad():
        with steer_attention(model, batch.role_ids):
            whole = model(**batch.inputs).logits
        with steer_attention(model, batch.role_ids, layers=[0]), steer_attention(model, batch.role_ids, layers=[1]):
            assert model(**batch.inputs).logits.equal(whole)
        with (
            pytest.raises(ValueError, match="layer 1 is steered by 2 contexts"),
            steer_attention(model, batch.role_ids),
            steer_attention(model, batch.role_ids, layers=[1]),
        ):
            model(**batch.inputs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "post"}, "mode is 'post', expected one of logit, mass, abs"),
        ({"system": 1.2}, "system is 1.2, which makes its weight -0.2; expected 1 or less"),
        ({"image": -1.5}, "image is -1.5, which makes its weight -0.5; expected -1 or more"),
        ({"image": float("nan")}, "image is nan"),
        ({"queries": (9,)}, r"queries is \[9\], expected roles among Role.OTHER"),
        ({"queries": ()}, r"queries is \[\], expected roles among"),
        ({"queries": "first"}, "queries is 'first', expected roles, \"last\""),
        ({"layers": [7]}, r"layers is \[7\], expected one or more of the decoder's layers 0 to 1"),
        ({"layers": "1-5"}, "layers is '1-5', expected one or more of the decoder's layers 0 to 1"),
        ({"layers": "middle"}, "layers is 'middle', expected numbers and ranges"),
        ({"layers": "1-0"}, "layers is '1-0', expected one or more"),
        ({"heads": {}}, "heads names its own layers"),
        ({"heads": {0: [0]}, "layers": [0]}, "heads names its own layers"),
        ({"heads": {5: [0]}}, r"layers is \[5\]"),
    ],
)
def test_arguments_without_meaning(arguments: dict[str, Any], says: str) -> None:
    batch = make_batch(*MIXED)
    with pytest.raises(ValueError, match=says), steer_attention(tiny_vlm(), batch.role_ids, **arguments):
        pytest.fail("the context was entered")


def test_a_head_that_the_layer_has_not() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    with (
        pytest.raises(ValueError, match=r"heads of layer 0 are \[4\], expected numbers from 0 to 3"),
        steer_attention(model, batch.role_ids, heads={0: [4]}),
    ):
        model(**batch.inputs)


def test_roles_of_other_tokens() -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    with pytest.raises(ValueError, match="give the roles of exactly"), steer_attention(model, batch.role_ids[:, 1:]):
        model(**batch.inputs)
    cache = model(**batch.inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="enter steer_attention before"), steer_attention(model, batch.role_ids):
        model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)


def test_a_model_past_the_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    for layer in model.get_decoder().layers:
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match=r"cannot be steered, because"), steer_attention(model, batch.role_ids):
        model(**batch.inputs)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [("3", (3,)), ("0,2, 5-7", (0, 2, 5, 6, 7)), ("0.0-1.0", tuple(range(8))), ("0.5-0.75", (4, 5)), ([5, 1], (1, 5))],
)
def test_layer_specifications(spec: Any, layers: tuple[int, ...]) -> None:
    assert select_layers(spec, 8) == layers


def test_observed_layers_may_be_text_too() -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    with observe_attention(model, batch.role_ids, layers="0.5-1.0") as record:
        model(**batch.inputs)
    assert record.layers == (1,)


def test_weights_of_4_bits_are_steered() -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    batch = make_batch(*MIXED)
    model, dequantized = tiny_vlm(), tiny_vlm()
    for quantized, plain in zip(model.get_decoder().modules(), dequantized.get_decoder().modules(), strict=True):
        for name, child in list(quantized.named_children()):
            if isinstance(child, torch.nn.Linear):
                layer = Linear4bit(child.in_features, child.out_features, child.bias is not None, quant_type="nf4")
                layer.load_state_dict(child.state_dict())
                setattr(quantized, name, layer.to("cpu"))
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                getattr(plain, name).weight.data.copy_(weight)
    real = batch.inputs["attention_mask"].bool()
    for mode in MODES:
        outputs = []
        for either in (model, dequantized):
            with torch.no_grad(), steer_attention(either, batch.role_ids, image=0.5, system=0.7, mode=mode):
                outputs.append(either(**batch.inputs).logits[real])
        torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)


def log_sum_exp_too(module: Any, *tensors: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What Flex returns on a GPU: a log-sum-exp (B, H, N) where eager has probabilities."""
    output, _ = sdpa_attention_forward(module, *tensors, **kwargs)
    return output, output.new_zeros(output.shape[0], output.shape[2], output.shape[1])


AttentionInterface.register("log_sum_exp_too", log_sum_exp_too)
AttentionMaskInterface.register("log_sum_exp_too", AttentionMaskInterface()["sdpa"])


@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_that_returns_its_log_sum_exp(mode: Any) -> None:
    batch = make_batch(*MIXED)
    steered = Steered(batch.role_ids, 0.5, 0.7, mode, rows=rows_of(batch, ROWS["text"]))
    assert_matches(with_attn(tiny_vlm(), "log_sum_exp_too"), batch, steered, ROWS["text"])


@pytest.mark.parametrize("mode", MODES)
def test_a_low_default_dtype_does_not_round_strengths(mode: Any) -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    logits = []
    for dtype in (torch.float32, torch.bfloat16):  # as Lightning sets it under bf16-true
        torch.set_default_dtype(dtype)
        try:
            with torch.no_grad(), steer_attention(model, batch.role_ids, image=0.003, system=0.002, mode=mode):
                logits.append(model(**batch.inputs).logits)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: Any) -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    real = batch.inputs["attention_mask"].bool()
    exact, masses = expected(tiny_vlm, batch.inputs, Steered(batch.role_ids, 0.02, 0.01, mode), KEYS)
    plain_exact, _ = expected(tiny_vlm, batch.inputs, Steered(batch.role_ids, 0.0, 0.0, mode), KEYS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**batch.inputs).logits
        with (
            observe_attention(model, batch.role_ids, queries=EVERY_ROLE, keys=KEYS) as record,
            steer_attention(model, batch.role_ids, image=0.02, system=0.01, mode=mode),
        ):
            steered = model(**batch.inputs).logits
    error, unsteered = ((a.double() - b)[real].abs().mean() for a, b in ((steered, exact), (plain, plain_exact)))
    assert error <= 2 * unsteered
    assert record.stacked().dtype == torch.float32
    assert (record.stacked()[0].double() - masses[0])[real.nonzero()[:, 0]].abs().mean() < 0.02


def test_columns_carry_a_bias_that_bfloat16_would_round() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm(dtype=torch.bfloat16)
    seen: list[Tensor] = []

    def spy(module: Any, query: Tensor, key: Tensor, *rest: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append((query[..., 8:].float() @ key.repeat_interleave(2, 1)[..., 8:].float().mT) * kwargs["scaling"])
        return sdpa_attention_forward(module, query, key, *rest, **kwargs)

    AttentionInterface.register("columns_spy", spy)
    AttentionMaskInterface.register("columns_spy", AttentionMaskInterface()["sdpa"])
    with_attn(model, "columns_spy")
    with torch.no_grad(), steer_attention(model, batch.role_ids, image=0.15, system=1.0, mode="mass"):
        model(**batch.to(torch.bfloat16).inputs)
    bias = seen[0][:, 0, 0]
    assert bias[batch.role_ids == Role.IMAGE].sub(torch.tensor(1.15).log()).abs().max() < 1e-5
    assert bias[batch.role_ids == Role.SYSTEM].max() < -900
    assert bias[batch.role_ids == Role.USER].eq(0).all()


@pytest.mark.slow
def test_a_compiled_model_is_steered_and_then_not() -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with steer_attention(model, batch.role_ids):
            steered = model(**batch.inputs).logits
        model.forward = torch.compile(model.forward, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(model(**batch.inputs).logits, plain)
            with steer_attention(model, batch.role_ids):
                torch.testing.assert_close(model(**batch.inputs).logits, steered)


def test_dropout_under_abs_is_refused() -> None:
    batch, model = make_batch(*MIXED), tiny_vlm(attention_dropout=0.1).train()
    with (
        pytest.raises(ValueError, match=r"the model wants 0.1; call model.eval"),
        steer_attention(model, batch.role_ids, mode="abs"),
    ):
        model(**batch.inputs)


def test_last_needs_a_mask_that_tells_padding() -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    length = batch.role_ids.shape[1]
    embeddings = model.get_input_embeddings()(batch.inputs["input_ids"])
    mask = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
    with (
        pytest.raises(ValueError, match="give the model such a one"),
        steer_attention(model, batch.role_ids, queries="last"),
    ):
        model.get_decoder()(inputs_embeds=embeddings, attention_mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ROWS)
def test_on_a_gpu(mode: Any, rows: str) -> None:
    batch = make_batch(*MIXED, padding_side="left")
    steered = Steered(batch.role_ids, 0.5, 0.7, mode, rows=rows_of(batch, ROWS[rows]))
    logits, _ = expected(tiny_vlm, batch.inputs, steered, KEYS)
    model, real = tiny_vlm().cuda(), batch.inputs["attention_mask"].bool()
    inputs = {name: x.cuda() for name, x in batch.inputs.items()}
    options: Any = {"image": 0.5, "system": 0.7, "mode": mode, "queries": ROWS[rows]}
    with torch.no_grad(), steer_attention(model, batch.role_ids.cuda(), **options):
        ours = model(**inputs).logits.cpu()
    torch.testing.assert_close(ours[real].double(), logits[real], rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("mode", MODES)
def test_sequences_packed_for_flash_are_steered_as_if_alone(mode: str) -> None:
    model = tiny_vlm()
    batches = [make_batch(Conversation(images=0, response=count)) for count in (6, 3)]
    alone = []
    for batch in batches:
        with steer_attention(model, batch.role_ids, system=0.6, mode=mode):
            alone.append(model(**batch.inputs).logits)
    lengths = [batch.role_ids.shape[1] for batch in batches]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(4, 1, -1)
    ids, roles = (
        torch.cat(each, dim=1) for each in zip(*((b.inputs["input_ids"], b.role_ids) for b in batches), strict=True)
    )
    model.set_attn_implementation({"text_config": "fake_flash_attention_2"})
    plain = model(input_ids=ids, position_ids=positions).logits
    with steer_attention(model, roles, system=0.6, mode=mode):
        steered = model(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(steered, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, plain, atol=1e-3)
