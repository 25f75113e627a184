"""The differentiable log-sum-exp of fused attention against logsumexp in float64, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from avar_lightning.attention import attention_mass, fused
from avar_lightning.attention.fused import FusedCalls
from avar_lightning.attention.kernels import (
    KERNELS,
    CPUFlash,
    CUDAEfficient,
    CUDAFlash,
    CuDNN,
    Kernel,
    carries,
    carry_gradient,
)
from avar_lightning.attention.reference import eager_mass
from avar_lightning.attention.visibility import Causal, Masked, OnKeys, Selection, in_groups

BATCH, HEADS, KEY_HEADS, LENGTH, DIM = 2, 4, 2, 37, 16
MASKS = ("everything", "causal", "bool", "bool by head", "additive", "lowest")


def tensors(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, heads, LENGTH, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def visible(kind: str) -> Tensor:
    """What rows see, bool (B, H, N, K); under the masks that hide at random, one row sees nothing."""
    if kind == "everything":
        return torch.ones(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.bool)
    if kind == "causal":
        return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, HEADS, -1, -1)
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, HEADS if kind == "bool by head" else 1, LENGTH, LENGTH)
    seen = torch.rand(shape, generator=generator) < 0.6
    seen[..., 0] = True
    seen[0, :, 5] = False
    return seen.expand(-1, HEADS, -1, -1)


def arguments(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What says so to scaled dot product attention."""
    if kind in ("everything", "causal"):
        return {"is_causal": kind == "causal", "enable_gqa": True, "scale": 0.3}
    mask = visible(kind)[:, : HEADS if kind == "bool by head" else 1]
    if not kind.startswith("bool"):
        lowest = -torch.inf if kind == "additive" else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)
    return {"attn_mask": mask, "enable_gqa": True, "scale": 0.3}


def expected(q: Tensor, k: Tensor, v: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by their definitions; a row that sees nothing has 0 of both."""
    k, v = (tensor.repeat_interleave(HEADS // KEY_HEADS, dim=1) for tensor in (k, v))
    hidden = ~visible(kind)
    logits = (q @ k.mT * 0.3).masked_fill(hidden, torch.finfo(q.dtype).min)
    nothing = hidden.all(-1)
    out = logits.softmax(-1).masked_fill(hidden, 0.0) @ v
    return out, logits.logsumexp(-1).masked_fill(nothing, 0.0)


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as the kernel gives them."""
    with FusedCalls() as overheard:
        out = scaled_dot_product_attention(q, k, v, **arguments(kind, q.dtype))
    told = overheard.of(q, k, 0.3)
    assert told is not None
    return out, told.lse_BHN


@pytest.mark.parametrize("kind", MASKS)
def test_values_and_gradients_are_those_of_the_definition(kind: str) -> None:
    inputs = tensors(torch.float64)
    outputs, exact = attend(*inputs, kind), expected(*inputs, kind)
    sees = visible(kind).any(-1)
    torch.testing.assert_close(outputs[1].masked_fill(~sees, 0.0), exact[1])
    # Rows whose output is not used, rows whose log-sum-exp is not, and both.
    weights = torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=torch.float64), torch.randn(exact[1].shape).double() * sees
    weights[0][..., ::3, :] = 0.0
    weights[0].mul_(sees[..., None])
    weights[1][..., 1::3] = 0.0
    for ours, theirs in zip(
        torch.autograd.grad(outputs, inputs, weights), torch.autograd.grad(exact, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_groups", [1, 2, 9])
@pytest.mark.parametrize("kind", MASKS)
def test_wider_heads_give_the_masses_of_the_definition(kind: str, num_groups: int) -> None:
    q, k, v = inputs = tensors(torch.float64)
    groups = torch.rand(BATCH, LENGTH, num_groups, generator=torch.Generator().manual_seed(2)) < 0.4
    with FusedCalls(groups) as overheard:
        out = scaled_dot_product_attention(q, k, v, **arguments(kind, q.dtype))
    told = overheard.of(q, k, 0.3)
    assert told is not None
    assert told.mass_BHNG is not None
    sees = visible(kind).any(-1)
    exact = *expected(*inputs, kind), eager_mass(q, k, groups, visible(kind), scale=0.3)
    outputs = out, told.lse_BHN, told.mass_BHNG
    torch.testing.assert_close((told.lse_BHN.masked_fill(~sees, 0.0), told.mass_BHNG), exact[1:])
    weights = [torch.randn(each.shape).double() * (sees if each.dim() == 3 else sees[..., None]) for each in exact]
    for ours, theirs in zip(
        torch.autograd.grad(outputs, inputs, weights), torch.autograd.grad(exact, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("how", ["bfloat16", "wider values", "no groups"])
def test_heads_are_as_they_are_where_masses_would_be_rounded(how: str) -> None:
    q, k, v = tensors(torch.bfloat16 if how == "bfloat16" else torch.float32)
    v = torch.cat([v, v], dim=-1) if how == "wider values" else v
    groups = None if how == "no groups" else torch.ones(BATCH, LENGTH, 1, dtype=torch.bool)
    with FusedCalls(groups) as overheard:
        out = scaled_dot_product_attention(q, k, v, **arguments("causal", q.dtype))
    told = overheard.of(q, k, 0.3)
    assert told is None or told.mass_BHNG is None
    assert torch.equal(out, scaled_dot_product_attention(q, k, v, **arguments("causal", q.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_the_kernel_s(dtype: torch.dtype) -> None:
    inputs = tensors(dtype)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outputs, exact = attend(*inputs, "causal"), expected(*exact_inputs, "causal")
    weights = torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=dtype), torch.randn(BATCH, HEADS, LENGTH)
    double = [weight.double() for weight in weights]

    def errors(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]

    plain = errors(
        torch.autograd.grad(outputs[0], inputs, weights[0], retain_graph=True),
        torch.autograd.grad(exact[0], exact_inputs, double[0], retain_graph=True),
    )
    both = errors(
        torch.autograd.grad(outputs, inputs, weights), torch.autograd.grad(exact, exact_inputs, tuple(double))
    )
    assert all(ours <= 2 * theirs for ours, theirs in zip(both, plain, strict=True)), (both, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_attention_itself_stays_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    inputs = tensors(dtype)
    plain = scaled_dot_product_attention(*inputs, **arguments(kind, dtype))
    weight = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, weight)
    out, lse = attend(*inputs, kind)
    assert torch.equal(out, plain)
    zero = torch.zeros_like(lse)
    for gradients in (
        torch.autograd.grad(out, inputs, weight, retain_graph=True),
        torch.autograd.grad((out, lse), inputs, (weight, zero), retain_graph=True),
    ):
        assert all(map(torch.equal, gradients, wanted))


@pytest.mark.parametrize("kind", MASKS)
def test_attention_under_autocast_stays_bit_for_bit(kind: str) -> None:
    inputs = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = scaled_dot_product_attention(*inputs, **arguments(kind, torch.float32))
        out, _ = attend(*inputs, kind)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain)
    weight = torch.randn_like(out)
    wanted = torch.autograd.grad(plain, inputs, weight)
    assert all(map(torch.equal, torch.autograd.grad(out, inputs, weight), wanted))


def test_one_row_whose_heads_stand_in_rows() -> None:
    """As transformers hands over the masked query of a decoding step."""
    q, k, v = tensors(torch.float64)
    q = q[:, :, -1:]
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    with FusedCalls() as overheard:
        scaled_dot_product_attention(q.reshape(BATCH, KEY_HEADS, HEADS // KEY_HEADS, DIM), k, v, mask, scale=0.3)
    told = overheard.of(q, k, 0.3)
    assert told is not None
    logits = q @ k.repeat_interleave(HEADS // KEY_HEADS, dim=1).mT * 0.3
    torch.testing.assert_close(told.lse_BHN, logits.logsumexp(-1))


@pytest.mark.parametrize("groups", [None, torch.ones(BATCH, LENGTH - 1, 2).bool()], ids=["", "groups of others"])
@pytest.mark.parametrize("how", ["dropout", "float16", "mask with a gradient", "twice", "other scale", "other keys"])
def test_what_cannot_be_told_is_not_told(how: str, groups: Tensor | None) -> None:
    q, k, v = tensors(torch.float16 if how == "float16" else torch.float32)
    options: dict[str, Any] = {"scale": 0.3, "enable_gqa": True, "dropout_p": 0.2 if how == "dropout" else 0.0}
    if how == "mask with a gradient":
        options["attn_mask"] = torch.zeros(LENGTH, LENGTH, requires_grad=True)
    torch.manual_seed(0)
    plain = scaled_dot_product_attention(q, k, v, **options)
    torch.manual_seed(0)
    with FusedCalls(groups) as overheard:
        out = scaled_dot_product_attention(q, k, v, **options)
        if how == "twice":
            scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(out, plain)
    assert overheard.of(q, k[:, :, 1:] if how == "other keys" else k, 0.4 if how == "other scale" else 0.3) is None


@pytest.mark.parametrize("size", [1e-3, 0.06, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_part_of_the_log_sum_exp_is_not_rounded_away(dtype: torch.dtype, size: float) -> None:
    """However small beside the output's own gradient; values and keys have means, as those of real models have."""
    q, k, v = tensors(dtype)
    with torch.no_grad():
        v += 2.0
        k += torch.linspace(-2, 2, DIM, dtype=dtype)
    out, lse = attend(q, k, v, "causal")
    weight = torch.randn(out.shape, dtype=dtype)
    dlse = size * torch.randn(lse.shape)
    both = torch.autograd.grad((out, lse), (q, k), (weight, dlse), retain_graph=True)
    plain = torch.autograd.grad(out, (q, k), weight)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    exact = torch.autograd.grad(expected(*exact_inputs, "causal")[1], exact_inputs[:2], dlse.double())
    for ours, without, theirs in zip(both, plain, exact, strict=True):
        error = (ours.double() - without.double() - theirs).norm() / (theirs.norm() + without.norm())
        assert error < (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_carried_is_the_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    out = (torch.randn(400, 16, generator=generator) + 2).to(dtype)
    for power in range(-24, 25, 4):
        grad = (10.0**power * torch.randn(400, 16, generator=generator)).to(dtype)
        for relative in (1e-6, 1e-3, 1.0, 1e6):
            dlse = 10.0**power * relative * torch.randn(400, generator=generator)
            carried, other = carry_gradient(grad, out, dlse)
            left = (carried.double() * other.double()).sum(-1)
            wanted = (grad.double() * out.double()).sum(-1) - dlse
            scale = (grad.double() * out.double()).abs().sum(-1) + dlse.abs()
            assert ((left - wanted).abs() / scale).max() < 1e-6
            assert torch.equal(carried, grad) or relative == 1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1e-12, 1.0, 1e12])
def test_gradients_know_no_scale(size: float, dtype: torch.dtype) -> None:
    """With rows whose output nobody wants, and rows of which little is wanted, at every scale of the loss."""
    q, k, v = tensors(dtype)
    out, lse = attend(q, k, v, "causal")
    weight, dlse = torch.randn(out.shape, dtype=dtype), torch.randn(lse.shape)
    weight[:, :, ::3] = 0.0
    weight[:, :, 1::3] *= 1e-18 if size == 1.0 else 1.0
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    exact = torch.autograd.grad(
        expected(*exact_inputs, "causal"), exact_inputs, [(size * weight.double()), size * dlse.double()]
    )
    ours = torch.autograd.grad((out, lse), (q, k, v), (weight * size, dlse * size))
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < (2e-5 if dtype == torch.float32 else 2e-2)


def test_rows_without_a_part_in_it_are_called_as_they_were() -> None:
    grad, out, dlse = torch.zeros(3, 8), torch.randn(3, 8), torch.tensor([2.0, 0.0, -1.0])
    grad[2] = 1e-3
    carried, other = carry_gradient(grad, out, dlse)
    torch.testing.assert_close((grad * out).sum(-1) - (carried * other).sum(-1), dlse)
    assert torch.equal(carried[1:], grad[1:])
    assert torch.equal(other[1], out[1])


class Unsound(CPUFlash):
    """A kernel whose backward knows its output better."""

    def backward(self, grad_out: Tensor, inputs: Any, out: Tensor, lse: Tensor, others: Any) -> Any:
        """With the output itself."""
        return super().backward(grad_out, inputs, self.forward(*inputs)[0], lse, others)


def test_a_kernel_that_does_not_carry_the_gradient_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(torch.float32)
    monkeypatch.setitem(KERNELS, ("cpu", SDPBackend.FLASH_ATTENTION.value), Unsound())
    with (
        pytest.warns(UserWarning, match=r"on cpu in torch.float32 does not carry .* as exact"),
        FusedCalls() as overheard,
    ):
        out = scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    assert overheard.of(q, k, 0.3) is None
    assert torch.equal(out, scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True))


class Broken(CPUFlash):
    """A kernel without a backward."""

    def backward(self, *args: Any) -> Any:
        """It has none."""
        raise RuntimeError("no kernel image")


def test_a_kernel_that_fails_when_it_is_tried_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(torch.float32)
    monkeypatch.setitem(KERNELS, ("cpu", SDPBackend.FLASH_ATTENTION.value), Broken())
    with pytest.warns(UserWarning, match=r"does not carry .*it says: no kernel image"), FusedCalls() as overheard:
        out = scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    assert overheard.of(q, k, 0.3) is None
    out.sum().backward()


def test_trying_a_kernel_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    carries.__wrapped__(CPUFlash(), torch.device("cpu"), torch.float32, 24)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kernel", [CUDAFlash(), CUDAEfficient(), CuDNN()], ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_s_kernels_are_called_with_what_they_take(kernel: Kernel, masked: bool) -> None:
    """As far as that can be seen without a GPU: shapes."""
    if masked and isinstance(kernel, CUDAFlash):
        pytest.skip("it takes no mask")
    with torch.device("meta"):
        q, grad = (torch.empty(BATCH, HEADS, LENGTH, DIM, dtype=torch.bfloat16) for _ in range(2))
        key_heads = HEADS if isinstance(kernel, CUDAEfficient) else KEY_HEADS
        k, v = (torch.empty(BATCH, key_heads, LENGTH, DIM, dtype=torch.bfloat16) for _ in range(2))
        mask = kernel.additive(torch.empty(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool), q.dtype) if masked else None
        inputs = (q, k, v, mask, not masked, 0.3)
        out, lse, others = kernel.forward(*inputs)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
        gradients = kernel.backward(grad, inputs, out, lse, others)
        assert [each.shape for each in gradients] == [q.shape, k.shape, v.shape]


def test_values_may_be_wider_than_queries() -> None:
    """The memory-efficient kernel takes them."""
    with torch.device("meta"):
        q, k = (torch.empty(BATCH, HEADS, LENGTH, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        v = torch.empty(BATCH, HEADS, LENGTH, 32, dtype=torch.bfloat16, requires_grad=True)
        out, _, _ = fused._FusedAttention.apply(q, k, v, None, None, True, 0.3, CUDAEfficient())
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [each.shape for each in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("num_keys", [32, 37, 40])
def test_rows_of_masks_are_aligned_for_the_memory_efficient_kernel(num_keys: int) -> None:
    seen = torch.rand(2, 1, 5, num_keys, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = CUDAEfficient().additive(seen, torch.bfloat16)
    assert torch.equal(mask, torch.where(seen, 0.0, -torch.inf).bfloat16())
    assert mask.stride(-1) == 1
    assert mask.stride(-2) % 8 == 0


CUDA_KERNELS = {
    SDPBackend.FLASH_ATTENTION: (torch.bfloat16,),
    SDPBackend.EFFICIENT_ATTENTION: (torch.bfloat16, torch.float32),
    SDPBackend.CUDNN_ATTENTION: (torch.bfloat16,),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["everything", "causal", "mask"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("backend", "dtype"), [(key, each) for key, dtypes in CUDA_KERNELS.items() for each in dtypes])
def test_on_a_gpu(backend: SDPBackend, dtype: torch.dtype, width: int, kind: str) -> None:
    if kind == "mask" and backend == SDPBackend.FLASH_ATTENTION:
        pytest.skip("it takes no mask")
    length, key_heads = 300, HEADS if backend == SDPBackend.EFFICIENT_ATTENTION else KEY_HEADS
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, heads, length, width) for heads in (HEADS, key_heads, key_heads, HEADS)]
    *inputs, weight = (torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes)
    q, k, v = (each.requires_grad_() for each in inputs)
    dlse = 0.05 * torch.randn(2, HEADS, length, generator=generator, device="cuda")
    seen = torch.rand(2, 1, length, length, generator=generator, device="cuda") < 0.6
    options: dict[str, Any] = {"attn_mask": seen if kind == "mask" else None, "is_causal": kind == "causal"}
    with sdpa_kernel(backend):
        plain = scaled_dot_product_attention(q, k, v, **options, enable_gqa=key_heads != HEADS)
        with FusedCalls() as overheard:
            out = scaled_dot_product_attention(q, k, v, **options, enable_gqa=key_heads != HEADS)
    told = overheard.of(q, k, None)
    assert told is not None
    lse = told.lse_BHN
    assert torch.equal(out, plain)
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    keys, values = (each.repeat_interleave(HEADS // key_heads, dim=1) for each in exact[1:])
    logits = exact[0] @ keys.mT * width**-0.5
    if kind == "causal":
        logits = logits.masked_fill(torch.ones(length, length, device="cuda").triu(1).bool(), -torch.inf)
    elif kind == "mask":
        logits = logits.masked_fill(~seen, -torch.inf)
    exact_outputs = logits.softmax(-1) @ values, logits.logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact_outputs[1], rtol=1e-3, atol=1e-3)
    both = torch.autograd.grad((out, lse), (q, k, v), (weight, dlse))
    without = torch.autograd.grad(plain, (q, k, v), weight, retain_graph=True)
    wanted = torch.autograd.grad(exact_outputs, exact, (weight.double(), dlse.double()), retain_graph=True)
    wanted_without = torch.autograd.grad(exact_outputs[0], exact, weight.double())
    for ours, plains, theirs, plain_theirs in zip(both, without, wanted, wanted_without, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error <= 2 * (plains.double() - plain_theirs).norm() / plain_theirs.norm()


def test_masses_have_no_gradient_where_only_values_train() -> None:
    q, k, v = (tensor.detach() for tensor in tensors(torch.float32))
    assert not attend(q, k, v.requires_grad_(), "causal")[1].requires_grad
    assert attend(q, k.requires_grad_(), v, "causal")[1].requires_grad


@pytest.mark.parametrize("kind", ["causal", "bool", "bool by head", "additive"])
def test_masses_from_the_keys_of_the_groups_alone(kind: str) -> None:
    inputs = tensors(torch.float64)
    generator = torch.Generator().manual_seed(2)
    groups = torch.rand(BATCH, LENGTH, 2, generator=generator) < torch.tensor([0.3, 0.2])
    groups[1, LENGTH // 2 :] = False  # samples have different numbers of keys
    rows = Selection(torch.rand(BATCH, LENGTH, generator=generator) < 0.5)
    keys, of_keys = in_groups(groups)
    seen = Causal(rows) if kind == "causal" else Masked(rows, arguments(kind, torch.float64)["attn_mask"], LENGTH)
    out, lse = attend(*inputs, kind)
    masses = attention_mass(
        rows.gather(inputs[0]),
        keys.gather(inputs[1]),
        of_keys,
        visible=OnKeys(seen, keys),
        scale=0.3,
        lse_BHQ=rows.gather(lse[..., None])[..., 0],
    )
    exact_out = expected(*inputs, kind)[0]
    exact = eager_mass(*inputs[:2], groups, visible(kind), scale=0.3)
    torch.testing.assert_close(rows.scatter(masses), rows.scatter(rows.gather(exact)))
    weight = torch.randn(BATCH, HEADS, LENGTH, 2, dtype=torch.float64)
    weights = torch.randn_like(out) * visible(kind).any(-1)[..., None], rows.scatter(rows.gather(weight))
    ours = torch.autograd.grad((out, rows.scatter(masses)), inputs, weights)
    theirs = torch.autograd.grad((exact_out, exact), inputs, weights)
    torch.testing.assert_close(ours, theirs)
