"""FlexAttention's log-sum-exp, overheard. PyTorch compiles it for GPUs alone, so here its eager version runs.

On a CPU PyTorch refuses gradients before it looks whether it is compiled; eagerly it has them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers import masking_utils
from transformers.integrations import flex_attention as integration

from avar_lightning.attention import flex as overhearing
from avar_lightning.attention import observe_attention
from avar_lightning.attention.flex import FlexCalls
from avar_lightning.roles import Role
from tests.attention.families import FAMILIES, SOFTCAPPED, Family

BATCH, KEY_HEADS = 2, 2
KEYS = (Role.IMAGE, Role.SYSTEM)


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "WrappedFlexAttention", lambda training: lambda: flex.flex_attention)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled_mask)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(overhearing, "WITHOUT_LSE", ())


def uncompiled_mask(**kwargs: Any) -> flex.BlockMask:
    return flex.create_block_mask(**kwargs | {"_compile": False})


def tensors(heads: int, dtype: torch.dtype, length: int = 40, dim: int = 16, device: str = "cpu") -> list[Tensor]:
    """Queries, keys, values."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(BATCH, each, length, dim) for each in (heads, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for shape in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """As a layer of transformers does, causally."""
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, BATCH, None, q.shape[2], k.shape[2], device=q.device)
    return integration.flex_attention_forward(nn.Module(), q, k, v, mask, scaling=0.3)


def definition(inputs: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The inputs in float64, and the same attention's output and log-sum-exp of them."""
    q, k, v = exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    keys, values = (each.repeat_interleave(q.shape[1] // KEY_HEADS, dim=1) for each in (k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ keys.mT * 0.3).masked_fill(hidden, -torch.inf)
    return exact_inputs, ((logits.softmax(-1) @ values).transpose(1, 2), logits.logsumexp(-1))


@pytest.mark.usefixtures("eager_flex")
@pytest.mark.parametrize("heads", [4, 6], ids=["", "keys repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exps_and_gradients_are_those_of_the_definition(dtype: torch.dtype, heads: int) -> None:
    q, k, v = inputs = tensors(heads, dtype)
    with FlexCalls() as overheard:
        out, _ = attend(q, k, v)
    told = overheard.of(q, k, 0.3)
    assert told is not None
    assert told.lse_BHN.dtype == torch.float32
    exact_inputs, exact = definition(inputs)
    # What float32 sums have, in bfloat16 too: it is not rounded to the values' dtype.
    torch.testing.assert_close(told.lse_BHN.double(), exact[1], rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, dtype=dtype), torch.randn(told.lse_BHN.shape)
    ours = torch.autograd.grad((out, told.lse_BHN), inputs, weights)
    theirs = torch.autograd.grad(exact, exact_inputs, [weight.double() for weight in weights])
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.double() - other).norm() / other.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("eager_flex")
def test_attention_itself_stays_bit_for_bit() -> None:
    inputs = tensors(4, torch.float32)
    plain = attend(*inputs)
    with FlexCalls():
        heard = attend(*inputs)
    assert heard[0].equal(plain[0])
    assert heard[1] is None
    assert plain[1] is None
    assert integration.compile_friendly_flex_attention.__module__ == integration.__name__


def test_where_flex_has_no_log_sum_exp_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [each.detach() for each in tensors(4, torch.float32)]
    asked = []

    def theirs(q: Tensor, k: Tensor, v: Tensor, *, return_aux: Any, **_: Any) -> Tensor:
        asked.append(return_aux)
        return torch.zeros_like(q)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", theirs)
    with FlexCalls() as overheard:
        attend(*inputs)
    assert asked == [None]
    assert overheard.of(*inputs[:2], 0.3) is None
    assert integration.compile_friendly_flex_attention is theirs


@pytest.mark.usefixtures("eager_flex")
def test_after_a_failure_transformers_is_as_it_was() -> None:
    theirs = integration.compile_friendly_flex_attention
    q, k, v = tensors(4, torch.float32)
    with pytest.raises(ValueError, match="dropout"), FlexCalls():
        integration.flex_attention_forward(SimpleNamespace(training=True), q, k, v, None, dropout=0.5)
    assert integration.compile_friendly_flex_attention is theirs


@pytest.mark.usefixtures("eager_flex")
def test_threads_hear_their_own_calls_alone() -> None:
    theirs, inputs = integration.compile_friendly_flex_attention, tensors(4, torch.float32)

    def attend_often(length: int) -> int:
        """How often a call was heard; every third thread only calls."""
        q, k, v = (each.detach()[:, :, :length] for each in inputs)
        heard = 0
        for _ in range(20):
            with FlexCalls() if length % 3 else nullcontext() as overheard:
                integration.flex_attention_forward(nn.Module(), q, k, v, None, scaling=0.3)
            heard += overheard is not None and overheard.of(q, k, 0.3) is not None
        return heard

    lengths = range(8, 40, 4)
    with ThreadPoolExecutor(len(lengths)) as pool:
        assert list(pool.map(attend_often, lengths)) == [20 if length % 3 else 0 for length in lengths]
    assert integration.compile_friendly_flex_attention is theirs


@pytest.mark.usefixtures("eager_flex")
@pytest.mark.parametrize("family", [FAMILIES["LLaVA"], SOFTCAPPED], ids=["LLaVA", "PaliGemma 2, which caps logits"])
def test_a_model_s_masses_come_from_the_keys_of_the_groups_alone(
    family: Family, computed: list[tuple[int, int]]
) -> None:
    results = []
    inputs, role_ids = family.make()
    num_grouped = int(torch.isin(role_ids, torch.tensor(KEYS)).sum(1).max())
    for attn, num_keys in (("flex_attention", num_grouped), ("eager", role_ids.shape[1])):
        model = family.build()
        model.set_attn_implementation({"text_config": attn})
        with observe_attention(model, role_ids, queries=(Role.USER, Role.RESPONSE), keys=KEYS) as record:
            model(**inputs)
        masses = record.stacked()
        parameters = list(model.get_decoder().layers.parameters())
        weights = torch.linspace(-1, 1, masses.numel()).view_as(masses)
        results.append((masses, torch.autograd.grad((masses * weights).sum(), parameters, materialize_grads=True)))
        assert {keys for _, keys in computed} == {num_keys}
        computed.clear()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    q, k, v = inputs = tensors(4, dtype, length=300, dim=64, device="cuda")
    plain, _ = attend(q, k, v)
    with FlexCalls() as overheard:
        out, _ = attend(q, k, v)
    assert out.equal(plain)
    told = overheard.of(q, k, 0.3)
    assert told is not None
    exact_inputs, exact = definition(inputs)
    torch.testing.assert_close(told.lse_BHN.double(), exact[1], rtol=1e-3, atol=1e-3)
    weights = torch.randn_like(out), torch.randn_like(told.lse_BHN)
    without = torch.autograd.grad(plain, inputs, weights[0])
    both = torch.autograd.grad((out, told.lse_BHN), inputs, weights)
    double = [weight.double() for weight in weights]
    exact_without = torch.autograd.grad(exact[0], exact_inputs, double[0], retain_graph=True)
    exact_both = torch.autograd.grad(exact, exact_inputs, double)
    for ours, plains, theirs, plain_theirs in zip(both, without, exact_both, exact_without, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error <= 2 * (plains.double() - plain_theirs).norm() / plain_theirs.norm()
