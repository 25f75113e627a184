"""`attention_mass` against the eager definition in float64: values, gradients, masks, precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avar_lightning.attention import attention_mass, attention_received, mass
from avar_lightning.attention.reference import eager_mass, eager_probabilities
from avar_lightning.attention.visibility import Causal, Everything, Masked, Selection

BATCH, HEADS, KEY_HEADS, LENGTH, DIM = 2, 4, 2, 9, 8


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=torch.float64, generator=generator)
    k = torch.randn(BATCH, KEY_HEADS, LENGTH, DIM, dtype=torch.float64, generator=generator)
    groups = torch.rand(BATCH, LENGTH, 3, generator=generator) < 0.4
    return q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), groups


def all_rows(batch: int = BATCH, length: int = LENGTH) -> Selection:
    return Selection(torch.ones(batch, length, dtype=torch.bool))


def triangle(length: int = LENGTH) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@pytest.fixture(params=[1, 3, 10**6], ids=["row", "three rows", "whole"])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a block, so that every test crosses block borders."""
    monkeypatch.setattr(mass, "CPU_BLOCK_BYTES", request.param * BATCH * HEADS * LENGTH * 8)
    return request.param


@pytest.mark.usefixtures("block_rows")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values_and_gradients_are_eager_s(softcap: float | None) -> None:
    q, k, groups = tensors()
    ours = attention_mass(q, k, groups, visible=Causal(all_rows()), scale=0.7, softcap=softcap)
    theirs = eager_mass(q, k, groups, triangle(), scale=0.7, softcap=softcap)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), (q, k)),
        torch.autograd.grad((theirs * weights).sum(), (q, k)),
    )


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mass, "CPU_BLOCK_BYTES", 2 * HEADS * 4 * 8)
    q, k, groups = (tensor[:1, ..., :4, :3].detach() for tensor in tensors())

    def function(q: Tensor, k: Tensor) -> Tensor:
        return attention_mass(q, k, groups, visible=Causal(all_rows(1, 4)), softcap=2.0)

    assert torch.autograd.gradcheck(function, (q.requires_grad_(), k.requires_grad_()))


@given(seed=st.integers(0, 10**6), density=st.floats(0.0, 1.0), additive=st.booleans(), per_head=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_mask(seed: int, density: float, additive: bool, per_head: bool) -> None:
    q, k, groups = tensors(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS if per_head else 1, LENGTH, LENGTH)
    visible = torch.rand(shape, generator=generator) < density
    given_mask = visible
    if additive:
        bias = torch.randn(shape, generator=generator, dtype=torch.float32)
        given_mask = bias.masked_fill(~visible, torch.finfo(torch.float32).min)
    ours = attention_mass(q, k, groups, visible=Masked(all_rows(), given_mask, LENGTH))
    # The lowest finite number means hidden, also in a row where nothing else is left.
    oracle_mask = given_mask.double().masked_fill(~visible, -torch.inf) if additive else visible
    theirs = eager_mass(q, k, groups, oracle_mask)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), (q, k)), torch.autograd.grad(theirs.square().sum(), (q, k))
    )


def test_masses_of_all_groups_sum_to_one() -> None:
    q, k, _ = tensors(torch.float32)
    partition = torch.nn.functional.one_hot(torch.randint(0, 5, (BATCH, LENGTH)), 5).bool()
    total = attention_mass(q, k, partition, visible=Causal(all_rows())).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_rows_that_see_nothing_have_no_mass_and_no_gradient() -> None:
    q, k, groups = tensors()
    hidden = triangle().expand(BATCH, 1, -1, -1).clone()
    hidden[0, 0, 4] = False
    out = attention_mass(q, k, groups, visible=Masked(all_rows(), hidden, LENGTH))
    grad = torch.autograd.grad(out.sum(), q)[0]
    assert out[0, :, 4].eq(0).all()
    assert grad[0, :, 4].eq(0).all()
    assert out[1, :, 4].gt(0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_float32_masses(dtype: torch.dtype) -> None:
    q, k, groups = tensors(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attention_mass(q, k, groups, visible=Causal(all_rows()))
        dq, dk = torch.autograd.grad(ours.square().sum(), (q, k))
        received = attention_received(q, k, torch.ones(BATCH, LENGTH), visible=Causal(all_rows()))
    exact_q, exact_k = q.detach().double().requires_grad_(), k.detach().double().requires_grad_()
    exact = eager_mass(exact_q, exact_k, groups, triangle())
    exact_dq, exact_dk = torch.autograd.grad(exact.square().sum(), (exact_q, exact_k))
    assert ours.dtype == torch.float32
    assert dq.dtype == dk.dtype == dtype
    torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-6)
    exact_received = eager_probabilities(exact_q, exact_k, triangle()).sum(2)
    torch.testing.assert_close(received, exact_received.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dq, exact_dq.to(dtype))
    torch.testing.assert_close(dk, exact_dk.to(dtype))


def bmm_on_tensor_cores(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`torch.bmm` with wider sums of 16-bit factors, which a CPU has not."""
    assert left.dtype == right.dtype == torch.bfloat16
    return left.to(out_dtype) @ right.to(out_dtype)


@pytest.mark.usefixtures("block_rows")
def test_products_of_bfloat16_factors_round_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mass, "_factor_dtype", lambda q, k: torch.bfloat16)
    q, k, groups = tensors(torch.bfloat16)
    monkeypatch.setattr(torch, "bmm", bmm_on_tensor_cores)
    ours = attention_mass(q, k, groups, visible=Causal(all_rows()), scale=0.3)
    gradients = torch.autograd.grad(ours.square().sum(), (q, k))
    exact_inputs = [each.detach().double().requires_grad_() for each in (q, k)]
    exact = eager_mass(*exact_inputs, groups, triangle(), scale=0.3)
    torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad(exact.square().sum(), exact_inputs), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2**-8


def test_attention_of_rows_has_a_gradient_where_factors_are_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's product with wider sums has none."""
    monkeypatch.setattr(mass, "_factor_dtype", lambda q, k: torch.bfloat16)
    monkeypatch.setattr(torch, "bmm", lambda *factors, out_dtype: bmm_on_tensor_cores(*factors, out_dtype).detach())
    q, k, _ = tensors(torch.bfloat16)
    out, _ = mass.attention_of_rows(q, k, k.detach(), visible=Causal(all_rows()), change=None, scale=0.3)
    exact_inputs = [each.detach().double().requires_grad_() for each in (q, k)]
    values = k.detach().double().repeat_interleave(HEADS // KEY_HEADS, dim=1)
    exact = eager_probabilities(*exact_inputs, triangle(), scale=0.3) @ values
    ours = torch.autograd.grad(out.float().square().sum(), (q, k))
    for mine, theirs in zip(ours, torch.autograd.grad(exact.square().sum(), exact_inputs), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2**-5


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_bfloat16_on_a_gpu(width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(BATCH, heads, 300, width) for heads in (HEADS, KEY_HEADS)]
    q, k = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for shape in shapes
    )
    groups = torch.rand(BATCH, 300, 2, generator=generator, device="cuda") < 0.4
    ours = attention_mass(q, k, groups, visible=Causal(Selection(torch.ones(BATCH, 300, dtype=torch.bool).cuda())))
    gradients = torch.autograd.grad(ours.square().sum(), (q, k))
    exact_inputs = [each.detach().double().requires_grad_() for each in (q, k)]
    exact = eager_mass(*exact_inputs, groups, triangle(300).cuda())
    torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(exact.square().sum(), exact_inputs), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2**-7


def test_second_derivative_is_refused() -> None:
    q, k, groups = tensors()
    grad = torch.autograd.grad(
        attention_mass(q, k, groups, visible=Everything(LENGTH)).square().sum(), q, create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.usefixtures("block_rows")
def test_received_is_the_weighted_sum_of_rows() -> None:
    q, k, _ = tensors()
    weights = torch.rand(BATCH, LENGTH, dtype=torch.float64)
    ours = attention_received(q, k, weights, visible=Causal(all_rows()))
    theirs = (eager_probabilities(q, k, triangle()) * weights[:, None, :, None]).sum(2)
    torch.testing.assert_close(ours, theirs.detach())
    assert not ours.requires_grad


def test_blocks_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, groups = tensors(torch.float32)
    rows_of_blocks: list[int] = []

    class Spy(Everything):
        def __call__(self, start: int, stop: int, num_keys: int) -> None:
            rows_of_blocks.append(stop - start)

    monkeypatch.setattr(mass, "CPU_BLOCK_BYTES", 4 * BATCH * HEADS * LENGTH * 4)
    attention_mass(q, k, groups, visible=Spy(LENGTH))
    assert rows_of_blocks == [4, 4, 1]


def test_no_rows() -> None:
    q, k, groups = tensors()
    out = attention_mass(q[:, :, :0], k, groups, visible=Everything(LENGTH))
    assert out.shape == (BATCH, HEADS, 0, 3)


def test_shapes_that_do_not_fit() -> None:
    q, k, groups = tensors()
    with pytest.raises(ValueError, match="do not belong together"):
        attention_mass(q[:, :3], k, groups, visible=Everything(LENGTH))
    with pytest.raises(ValueError, match=r"expected \(2, 9, groups\)"):
        attention_mass(q, k, groups[:, :5], visible=Everything(LENGTH))
