"""`observe_attention` through a whole Qwen2.5-VL, against the attention that eager transformers returns."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from avar_lightning.attention import (
    AttentionRecord,
    find_vlm,
    observe_attention,
    observing,
    steer_attention,
)
from avar_lightning.attention.fused import Told
from avar_lightning.attention.reference import eager_probabilities, mass_of_probabilities
from avar_lightning.roles import Role
from tests.factories import Batch, Conversation, make_batch, tiny_vlm

KEYS = (Role.IMAGE, Role.SYSTEM)
QUERIES = (Role.USER, Role.RESPONSE)
MIXED = (Conversation(), Conversation(images=2, after=1), Conversation(system=0, images=0))


def exact_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The eager definition in the model's own dtype; the eager softmax of transformers is always float32."""
    probs = eager_probabilities(query, key, attention_mask, scale=kwargs["scaling"])
    return (probs @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)).transpose(1, 2), probs


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", lambda **kwargs: sdpa_mask(**kwargs | {"allow_is_causal_skip": False}))


def twin_of(model: PreTrainedModel, attn: str = "exact", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The same weights under an attention that returns its probabilities, in another precision."""
    twin = tiny_vlm("sdpa", dtype=dtype)
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation({"text_config": attn})
    return twin


def eager_masses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(L, B, H, N, G) from `output_attentions`, rows of other roles zero."""
    attentions = model(**batch.to(model.dtype).inputs, output_attentions=True).attentions
    masses = torch.stack([mass_of_probabilities(a, batch.role_ids, KEYS) for a in attentions])
    return masses * torch.isin(batch.role_ids, torch.tensor(QUERIES))[None, :, None, :, None]


def observed(model: nn.Module, batch: Batch, **kwargs: Any) -> AttentionRecord:
    with observe_attention(model, batch.role_ids, **{"queries": QUERIES, "keys": KEYS} | kwargs) as record:
        model(**batch.inputs)
    return record


def objective(masses: Tensor) -> Tensor:
    """A loss that every row, layer, head and group has a part in."""
    weights = torch.linspace(-1, 1, masses.numel(), dtype=masses.dtype).view_as(masses)
    return (masses * weights).sum() + (masses + 0.1).log().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that are not zero everywhere: the last layer's values have a part in no mass."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.fixture(params=[0.0, math.inf], ids=["wider heads", "log-sum-exps"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows and keys there are, masses beside SDPA take this way."""
    monkeypatch.setattr(observing, "MANY", request.param)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("conversations", [MIXED[:1], MIXED], ids=["unpadded", "padded"])
def test_masses_and_gradients_are_eager_s(
    attn: str, padding_side: str, conversations: tuple[Conversation, ...]
) -> None:
    batch = make_batch(*conversations, padding_side=padding_side)
    model = tiny_vlm(attn)
    twin = twin_of(model)
    record = observed(model, batch)
    expected = eager_masses(twin, batch)
    torch.testing.assert_close(record.stacked().double(), expected, rtol=1e-4, atol=1e-5)
    objective(record.stacked()).backward()
    objective(expected).backward()
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys()
    assert any("visual" in name for name in ours) == bool(sum(c.images for c in conversations))
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name].double(), grad, rtol=1e-3, atol=1e-4, msg=name)


def test_masses_are_those_that_transformers_returns() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    expected = eager_masses(twin_of(model, "eager", torch.float32), batch)
    torch.testing.assert_close(observed(model, batch).stacked(), expected, rtol=1e-4, atol=1e-5)


def test_float64_model_gives_float64_masses() -> None:
    batch = make_batch(*MIXED).to(torch.float64)
    model = tiny_vlm(dtype=torch.float64)
    torch.testing.assert_close(observed(model, batch).stacked(), eager_masses(twin_of(model), batch))


def test_bfloat16_is_no_worse_than_eager_in_bfloat16() -> None:
    batch = make_batch(*MIXED)
    exact = eager_masses(twin_of(tiny_vlm()), batch)
    low = tiny_vlm(dtype=torch.bfloat16)
    ours = observed(low, batch.to(torch.bfloat16)).stacked()
    theirs = eager_masses(twin_of(low, "eager", torch.bfloat16), batch)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


def test_autocast() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record = observed(model, batch, keys=tuple(Role))
        total = record.stacked().sum(-1)
    assert record.stacked().dtype == torch.float32
    expected = record.query_mask()[None, :, None].float().expand_as(total)
    # The kernel sums bfloat16 logits, with an exponential of its own.
    torch.testing.assert_close(total, expected, rtol=0, atol=5e-4)
    objective(record.stacked()).backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.usefixtures("_way")
def test_padding_side_does_not_matter() -> None:
    model = tiny_vlm()
    left, right = make_batch(*MIXED, padding_side="left"), make_batch(*MIXED, padding_side="right")
    from_left, from_right = observed(model, left), observed(model, right)
    for b, length in enumerate(left.lengths):
        torch.testing.assert_close(
            from_left.stacked()[:, b, :, -length:],
            from_right.stacked()[:, b, :, :length],
            rtol=1e-4,
            atol=1e-6,
        )
    torch.testing.assert_close(from_left.vas(), from_right.vas(), rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.usefixtures("_way")
def test_output_is_untouched_inside_and_after() -> None:
    batch = make_batch(*MIXED)
    for attn in ("sdpa", "eager"):
        model = tiny_vlm(attn)
        before = model(**batch.inputs, labels=batch.inputs["input_ids"])
        before.loss.backward()
        grads = {name: grad.clone() for name, grad in gradients(model).items()}
        with observe_attention(model, batch.role_ids):
            inside = model(**batch.inputs).logits
        model.zero_grad()
        after = model(**batch.inputs, labels=batch.inputs["input_ids"])
        after.loss.backward()
        if observing.MANY > 0:
            assert inside.equal(before.logits)
        torch.testing.assert_close(inside, before.logits)
        assert after.logits.equal(before.logits)
        assert all(grad.equal(grads[name]) for name, grad in gradients(model).items())


def test_an_exception_leaves_nothing_behind() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    before = model(**batch.inputs).logits
    with pytest.raises(KeyError), observe_attention(model, batch.role_ids):
        raise KeyError
    assert not model.get_decoder()._forward_pre_hooks
    assert not model.get_decoder()._forward_hooks
    assert model(**batch.inputs).logits.equal(before)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("received", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradient_checkpointing(backward_inside: bool, received: bool) -> None:
    batch = make_batch(*MIXED)
    plain = tiny_vlm().train()
    expected = observed(plain, batch).stacked()
    objective(expected).backward()
    model = tiny_vlm().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with observe_attention(model, batch.role_ids, queries=QUERIES, keys=KEYS, received=received) as record:
        model(**batch.inputs, use_cache=False)
        first, masses = record.mass[0], record.stacked()
        if backward_inside:
            objective(masses).backward()
    if not backward_inside:
        objective(masses).backward()
    torch.testing.assert_close(masses, expected)
    assert record.mass[0] is first, "the second run of the layer took the place of the first"
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_reentrant_checkpointing_is_refused() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        observed(model, batch)
    with torch.no_grad():
        observed(model, batch)


def test_nothing_is_kept_alive() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    record = observed(model, batch)
    mass = weakref.ref(record.mass[0])
    del record  # never went through backward
    gc.collect()
    assert mass() is None


@pytest.mark.usefixtures("_way")
def test_lora() -> None:
    batch = make_batch(*MIXED)
    model = get_peft_model(tiny_vlm(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    record = observed(model, batch)
    objective(record.stacked()).backward()
    assert gradients(model)
    assert all("lora" in name for name in gradients(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(record.stacked(), observed(merged, batch).stacked(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "wider"), [("alone", {True}), ("without gradient", {True}), ("few rows", {False}), ("two", {False, True})]
)
def test_wider_heads_are_for_those_who_want_many(how: str, wider: set[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Told | None] = []
    observe = observing.ForwardObserver.observe

    def spy(self: Any, call: Any, what: Told | None = None) -> None:
        told.append(what)
        observe(self, call, what)

    monkeypatch.setattr(observing.ForwardObserver, "observe", spy)
    batch, model = make_batch(Conversation(images=2, response=40)), tiny_vlm()
    queries = (Role.USER,) if how == "few rows" else (Role.RESPONSE,)
    second = observe_attention(model, batch.role_ids) if how == "two" else nullcontext()
    with torch.set_grad_enabled(how != "without gradient"), second:
        observed(model, batch, queries=queries)
    assert None not in told
    assert {each.mass_BHNG is not None for each in told if each} == wider


def test_several_observers_share_wider_heads(computed: list[tuple[int, int]]) -> None:
    batch, model = make_batch(Conversation(images=2, response=40)), tiny_vlm()
    wanted: list[dict[str, Any]] = [
        {"queries": (Role.RESPONSE,), "keys": KEYS},
        {"queries": (Role.USER,), "keys": KEYS},  # few: has them from the log-sum-exp
        {"queries": (Role.IMAGE, Role.RESPONSE), "keys": (Role.USER, Role.RESPONSE, Role.IMAGE)},
    ]
    alone = [observed(model, batch, **each).stacked() for each in wanted]
    computed.clear()
    with ExitStack() as stack:
        records = [stack.enter_context(observe_attention(model, batch.role_ids, **each)) for each in wanted]
        model(**batch.inputs)
    together = [record.stacked() for record in records]
    num_users = int((batch.role_ids == Role.USER).sum())
    num_grouped = int(torch.isin(batch.role_ids, torch.tensor(KEYS)).sum())
    assert computed == [(num_users, num_grouped)] * len(records[0].layers)
    torch.testing.assert_close(together, alone)
    parameters = list(model.get_decoder().layers.parameters())
    ours, theirs = (
        torch.autograd.grad(sum(objective(each) for each in every), parameters, allow_unused=True)
        for every in (together, alone)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_only_the_chosen_layers_and_rows() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    record = observed(model, batch, layers=[1], queries=(Role.RESPONSE,))
    assert record.layers == (1,)
    everything = observed(model, batch).mass[1]
    response = batch.role_ids == Role.RESPONSE
    torch.testing.assert_close(record.mass[1], everything * response[:, None, :, None])
    assert record.query_mask(Role.RESPONSE).equal(response)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_work_is_proportional_to_the_rows_and_beside_a_fused_kernel_to_the_groups(
    attn: str, computed: list[tuple[int, int]]
) -> None:
    batch = make_batch(Conversation(response=2), Conversation(response=3))
    observed(tiny_vlm(attn), batch, queries=(Role.RESPONSE,))
    role_ids = batch.role_ids
    grouped = ((role_ids == Role.IMAGE) | (role_ids == Role.SYSTEM)).sum(1).max().item()
    assert set(computed) == {(3, grouped if attn == "sdpa" else role_ids.shape[1])}


@pytest.mark.slow
@pytest.mark.parametrize("only", [None, [1]])
def test_compiled_layers_stay_compiled_and_are_observed(only: list[int] | None) -> None:
    batch, model, twin = make_batch(*MIXED), tiny_vlm(), tiny_vlm()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    counts = []
    inputs = batch.inputs | {"use_cache": False}
    for _ in range(4):
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)
        record, expected = (observed(each, batch, layers=only) for each in (model, twin))
        torch.testing.assert_close(record.stacked(), expected.stacked())
        with observe_attention(model, batch.role_ids, layers=only) as nested, steer_attention(model, batch.role_ids):
            steered = model(**inputs).logits
        with steer_attention(twin, batch.role_ids):
            torch.testing.assert_close(steered, twin(**inputs).logits)
        assert not torch.equal(nested.stacked(), record.stacked())
        objective(record.stacked()).backward()
        objective(expected.stacked()).backward()
        counts.append(len(graphs))
    torch.testing.assert_close(gradients(model), gradients(twin))
    assert counts[0] > 0
    assert counts[-1] == counts[1]


@pytest.mark.slow
def test_a_compiled_model_is_observed() -> None:
    batch, model = make_batch(*MIXED), tiny_vlm()
    expected = observed(model, batch).stacked()
    model.forward = torch.compile(model.forward, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(observed(model, batch).stacked(), expected)


def test_no_queries_at_all() -> None:
    batch = make_batch(Conversation(response=0))
    record = observed(tiny_vlm(), batch, queries=(Role.RESPONSE,))
    assert record.stacked().shape == (2, 1, 4, batch.role_ids.shape[1], 2)
    assert record.stacked().eq(0).all()
    assert record.vas().isnan().all()


def test_received_attention() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    record = observed(model, batch, received=True)
    attentions = twin_of(model)(**batch.to(torch.float64).inputs, output_attentions=True).attentions
    queries = record.query_mask().double()
    for layer, attention in enumerate(attentions):
        expected = (attention * queries[:, None, :, None]).sum(2) / queries.sum(1)[:, None, None]
        torch.testing.assert_close(record.received[layer].double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert observed(model, batch).received == {}


def test_nested_contexts_both_record() -> None:
    batch = make_batch(*MIXED)
    model = tiny_vlm()
    with observe_attention(model, batch.role_ids, queries=(Role.USER,)) as outer:
        with observe_attention(model, batch.role_ids, queries=(Role.RESPONSE,), layers=[0]) as inner:
            model(**batch.inputs)
        assert inner.layers == (0,)
        assert outer.layers == (0, 1)
    torch.testing.assert_close(outer.stacked(), observed(model, batch, queries=(Role.USER,)).stacked())
    torch.testing.assert_close(inner.mass[0], observed(model, batch, queries=(Role.RESPONSE,)).mass[0])


def test_the_last_fresh_forward_is_kept() -> None:
    model = tiny_vlm()
    first, second = make_batch(Conversation(), seed=1), make_batch(Conversation(), seed=2)
    with observe_attention(model, first.role_ids, queries=QUERIES) as record:
        model(**first.inputs)
        model(**second.inputs)
    torch.testing.assert_close(record.stacked(), observed(model, second).stacked())


def test_other_forwards_are_left_alone_when_asked() -> None:
    model = tiny_vlm()
    batch, other = make_batch(*MIXED), make_batch(Conversation(response=0), padding_side="left")
    with observe_attention(model, batch.role_ids, queries=QUERIES, only_matching=True) as record:
        model(**batch.inputs)
        model.generate(**other.inputs, max_new_tokens=3)
    torch.testing.assert_close(record.stacked(), observed(model, batch).stacked())
    with observe_attention(model, batch.role_ids, only_matching=True) as record:
        model(**other.inputs)
    assert record.layers == ()
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        record.vas()


def test_roles_of_another_shape_are_refused() -> None:
    batch = make_batch(*MIXED)
    with pytest.raises(ValueError, match=r"role_ids has shape \(3, 21\), but the forward has .* \(3, 22\)"):
        observed(tiny_vlm(), Batch(batch.inputs, batch.role_ids[:, 1:]))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"queries": (7,)}, "queries is .7."),
        ({"queries": ()}, "queries is"),
        ({"keys": (Role.IMAGE, Role.IMAGE)}, "keys is"),
        ({"layers": [2]}, "layers 0 to 1"),
        ({"layers": []}, "layers 0 to 1"),
    ],
)
def test_senseless_arguments_are_refused(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        observed(tiny_vlm(), make_batch(), **kwargs)


def test_senseless_role_ids_are_refused() -> None:
    batch = make_batch()
    for role_ids in (batch.role_ids.float(), batch.role_ids[0], batch.role_ids + 1):
        with pytest.raises(ValueError, match="role_ids"):
            observed(tiny_vlm(), Batch(batch.inputs, role_ids))


def test_roles_that_were_not_observed_are_refused() -> None:
    record = observed(tiny_vlm(), make_batch())
    with pytest.raises(ValueError, match="add it to `keys`"):
        record.mass_of(Role.USER)
    with pytest.raises(ValueError, match="add them to `queries`"):
        record.query_mask(Role.SYSTEM)


def test_find_vlm() -> None:
    model = tiny_vlm()
    assert find_vlm(model) is model
    assert find_vlm(nn.ModuleDict({"inside": nn.Sequential(model)})) is model
    with pytest.raises(ValueError, match="2 vision-language models"):
        find_vlm(nn.ModuleList([model, tiny_vlm()]))
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    for other in (nn.Linear(2, 2), LlamaForCausalLM(config)):
        with pytest.raises(ValueError, match="no Hugging Face vision-language model"):
            find_vlm(other)
