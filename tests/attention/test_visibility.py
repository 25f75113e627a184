"""Row selection and every kind of mask, against the N×N mask written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from avar_lightning.attention.registry import AttentionCall
from avar_lightning.attention.visibility import Masked, Selection, visibility_of

B, N = 3, 7
WANTED = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)


def seen(base: str, mask: object, *, num_keys: int = N, **kwargs: object) -> tuple[Selection, Tensor]:
    """What the wanted rows see of all keys, (B, Q, K)."""
    q, k = torch.zeros(B, 2, N, 4), torch.zeros(B, 2, num_keys, 4)
    rows = Selection(WANTED)
    visible = visibility_of(AttentionCall(base, nn.Module(), q, k, mask, dict(kwargs)), rows)
    out = torch.zeros(B, rows.count, num_keys, dtype=torch.bool)
    for start, stop in ((0, 2), (2, 3)):
        limit = visible.limit(start, stop)
        block = visible(start, stop, limit)
        out[:, start:stop, :limit] = True if block is None else block.expand(B, 2, -1, -1)[:, 0]
    return rows, out


def expected(full_BNK: Tensor, rows: Selection) -> Tensor:
    return torch.stack([full_BNK[b][rows.index_BS[b]] for b in range(B)])


def test_rows_are_gathered_and_put_back() -> None:
    rows = Selection(WANTED)
    x = torch.randn(B, 2, N, 3, requires_grad=True)
    assert rows.count == 3
    assert rows.last == [1, 6, 6]
    back = rows.scatter(rows.gather(x))
    torch.testing.assert_close(back, x * WANTED[:, None, :, None])
    back.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, WANTED[:, None, :, None].expand_as(x).float())


def test_all_rows_need_no_copy() -> None:
    rows = Selection(torch.ones(2, 4, dtype=torch.bool))
    x = torch.randn(2, 1, 4, 3)
    assert rows.gather(x) is x
    assert rows.scatter(x) is x


def test_no_rows() -> None:
    rows = Selection(torch.zeros(2, 4, dtype=torch.bool))
    gathered = rows.gather(torch.randn(2, 1, 4, 3))
    assert gathered.shape == (2, 1, 0, 3)
    assert rows.scatter(gathered).eq(0).all()


def test_missing_mask_is_causal_from_the_first_key_in_sdpa() -> None:
    rows, out = seen("sdpa", None, num_keys=N + 2)
    assert out.equal(expected(torch.ones(B, N, N + 2, dtype=torch.bool).tril(), rows))


def test_missing_mask_is_causal_to_the_last_key_in_flash() -> None:
    rows, out = seen("flash_attention_2", None, num_keys=N + 2)
    assert out.equal(expected(torch.ones(B, N, N + 2, dtype=torch.bool).tril(2), rows))


def test_window_counts_in_flash_only() -> None:
    triangle = torch.ones(B, N, N, dtype=torch.bool).tril()
    rows, out = seen("flash_attention_2", None, sliding_window=3)
    assert out.equal(expected(triangle.triu(-2), rows))
    rows, out = seen("sdpa", None, sliding_window=3)
    assert out.equal(expected(triangle, rows))


@pytest.mark.parametrize(("base", "kwargs"), [("eager", {}), ("flex_attention", {}), ("sdpa", {"is_causal": False})])
def test_missing_mask_hides_nothing(base: str, kwargs: dict[str, object]) -> None:
    assert seen(base, None, **kwargs)[1].all()


def test_padding_mask() -> None:
    padding = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    full = torch.ones(B, N, N, dtype=torch.bool).tril() & padding.bool()[:, None] & padding.bool()[:, :, None]
    rows, out = seen("flash_attention_2", padding)
    assert out.equal(expected(full, rows))
    rows, out = seen("flash_attention_2", padding, is_causal=False)
    assert out.equal(expected(padding.bool()[:, None].expand(B, N, N), rows))


@pytest.mark.parametrize("shape", [(B, 1, N, N), (1, 1, N, N), (B, 2, N, N), (B, 1, N, N + 3), (B, 1, 1, N)])
def test_four_dimensional_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    rows, out = seen("sdpa", mask)
    assert out.equal(expected(mask.expand(B, -1, N, -1)[:, 0, :, :N], rows))


def test_mask_per_head_keeps_its_heads() -> None:
    mask = torch.rand(B, 2, N, N) < 0.5
    rows = Selection(WANTED)
    block = Masked(rows, mask, N)(0, rows.count, N)
    assert block.equal(torch.stack([mask[b][:, rows.index_BS[b]] for b in range(B)]))


def test_block_mask() -> None:
    segment = torch.tensor([0, 0, 0, 1, 1, 1, 1])

    def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (segment[q] == segment[kv]) & (q >= kv)

    rows, out = seen("flex_attention", create_block_mask(packed, B, None, N, N, device="cpu"))
    full = torch.ones(N, N, dtype=torch.bool).tril() & (segment[:, None] == segment)
    assert out.equal(expected(full.expand(B, N, N), rows))


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "cu_seq_lens_q", "cache"])
def test_arguments_that_are_not_understood_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        seen("sdpa", None, **{name: torch.zeros(2)})


STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)
LENGTHS = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 3, "max_length_k": 3}


@pytest.mark.parametrize(
    ("kwargs", "numbers"),
    [
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, [1, 1, 2, 2, 2]),
        ({"position_ids": torch.tensor([[4, 5, 4, 5, 6]])}, [1, 1, 2, 2, 2]),
        ({"position_ids": torch.arange(5)[None], **LENGTHS}, [1, 1, 2, 2, 2]),
        (LENGTHS | {"cu_seq_lens_k": STARTS.clone()}, [1, 1, 2, 2, 2]),
        ({"position_ids": torch.arange(5)[None], **LENGTHS, "max_length_k": None}, None),  # ignored, if not whole
        ({"cu_seq_lens_q": STARTS}, None),
        ({"position_ids": torch.arange(3, 8)[None]}, None),
        ({}, None),
    ],
)
def test_which_sequence_a_key_is_of(kwargs: dict[str, Any], numbers: list[int] | None) -> None:
    q = torch.zeros(1, 2, 5, 4)
    call = AttentionCall("flash_attention_2", nn.Module(), q, q, None, kwargs)
    documents = call.documents()
    assert (None if documents is None else documents.tolist()) == (None if numbers is None else [numbers])
    if numbers is not None:
        rows = Selection(torch.tensor([[False, True, True, False, True]]))
        block = visibility_of(call, rows)(0, 3, 5)
        assert block is not None
        assert block[0, 0].int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]
        call.is_causal = False
        with pytest.raises(ValueError, match="not causal"):
            visibility_of(call, rows)


def test_queries_packed_in_another_way_than_keys_are_refused() -> None:
    q = torch.zeros(1, 2, 5, 4)
    kwargs = LENGTHS | {"cu_seq_lens_k": STARTS.clamp(max=3)}
    with pytest.raises(ValueError, match="expected rows and keys to be the same tokens"):
        AttentionCall("flash_attention_2", nn.Module(), q, q, None, kwargs).documents()


def test_mask_of_three_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        seen("sdpa", torch.ones(B, N, N))
