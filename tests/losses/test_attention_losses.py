"""Guidance losses: numbers worked by hand, masked means, and what happens to samples that lack a set."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from avar_lightning.losses import attention_guidance_loss, attention_share_loss

# 1 layer, 3 samples, 2 heads, 2 rows. Sample 1 asks in row 0 only; sample 2 has no image.
IMAGE = torch.tensor([[[[0.6, 0.2], [0.1, 0.3]], [[0.5, 9.0], [0.25, 9.0]], [[0.0, 0.0], [0.0, 0.0]]]])
SYSTEM = torch.tensor([[[[0.1, 0.3], [0.4, 0.2]], [[0.5, 9.0], [0.75, 9.0]], [[0.3, 0.5], [0.1, 0.1]]]])
QUERIES = torch.tensor([[True, True], [True, False], [True, True]])
NUM_IMAGE, NUM_SYSTEM = torch.tensor([4, 5, 0]), torch.tensor([2, 5, 2])


def grads(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [grad for grad in torch.autograd.grad(loss, inputs, allow_unused=True) if grad is not None]


def test_published_by_hand() -> None:
    enhance, suppress = attention_guidance_loss(IMAGE, SYSTEM, QUERIES, NUM_IMAGE, NUM_SYSTEM, eps=0.0)
    # Mean masses of sample 0: image 0.4 and 0.2 over 4 tokens, system 0.2 and 0.3 over 2.
    image = [(log(0.1) + log(0.05)) / 2, (log(0.1) + log(0.05)) / 2]
    system = [(log(0.1) + log(0.15)) / 2, (log(0.1) + log(0.15)) / 2, (log(0.2) + log(0.05)) / 2]
    torch.testing.assert_close(enhance, torch.tensor(-sum(image) / 2))
    torch.testing.assert_close(suppress, torch.tensor(sum(system) / 3))


def test_eps_is_inside_the_logarithm() -> None:
    zero = torch.zeros_like(IMAGE)
    enhance, suppress = attention_guidance_loss(zero, zero, QUERIES, NUM_IMAGE, NUM_SYSTEM, eps=1e-6)
    torch.testing.assert_close(enhance, torch.tensor(-log(1e-6)))
    torch.testing.assert_close(suppress, torch.tensor(log(1e-6)))


def test_share_by_hand() -> None:
    loss = attention_share_loss(IMAGE, SYSTEM, QUERIES, eps=0.0)
    shares = [[0.4 / 0.6, 0.2 / 0.5], [0.5, 0.25]]
    torch.testing.assert_close(loss, torch.tensor(-sum(log(s) for head in shares for s in head) / 4))


def test_hinge_by_hand() -> None:
    loss = attention_share_loss(IMAGE, SYSTEM, QUERIES, target=0.45, eps=0.0)
    torch.testing.assert_close(loss, torch.tensor((0.0 + 0.05 + 0.0 + 0.2) / 4))


def test_share_is_not_negative_and_a_dead_head_has_a_finite_gradient() -> None:
    image, system = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    image[..., 0, 0], system[..., 1, 0] = 1.0, 1.0
    image.requires_grad_()
    loss = attention_share_loss(image, system, torch.tensor([[True]]))
    assert attention_share_loss(image[:, :, :1], system[:, :, :1], torch.tensor([[True]])) >= 0
    assert grads(loss, image)[0].isfinite().all()


def test_rows_outside_the_queries_have_no_gradient() -> None:
    image, system = IMAGE.clone().requires_grad_(), SYSTEM.clone().requires_grad_()
    total = sum(attention_guidance_loss(image, system, QUERIES, NUM_IMAGE, NUM_SYSTEM))
    total = total + attention_share_loss(image, system, QUERIES)
    for grad in grads(total, image, system):
        assert grad[0, 1, :, 1].eq(0).all()
        assert grad[0, 0].ne(0).all()


def test_samples_that_lack_a_set_change_nothing() -> None:
    for samples in (slice(0, 2), slice(0, 3)):
        args = IMAGE[:, samples], SYSTEM[:, samples], QUERIES[samples]
        enhance, _ = attention_guidance_loss(*args, NUM_IMAGE[samples], NUM_SYSTEM[samples])
        share = attention_share_loss(*args)
        if samples.stop == 2:
            expected = enhance, share
    torch.testing.assert_close((enhance, share), expected)


@pytest.mark.parametrize("lacking", ["queries", "keys"])
def test_nobody_qualifies(lacking: str) -> None:
    image, system = IMAGE.clone().requires_grad_(), SYSTEM.clone().requires_grad_()
    queries, counts = QUERIES.clone(), torch.ones(3, dtype=torch.long)
    if lacking == "queries":
        queries[:] = False
        losses = [*attention_guidance_loss(image, system, queries, counts, counts)]
        losses.append(attention_share_loss(image, system, queries))
    else:
        losses = [*attention_guidance_loss(image, system, queries, counts * 0, counts * 0)]
        losses.append(attention_share_loss(image * 0, system, queries))
    for loss in losses:
        assert loss.item() == 0.0
        assert all(grad.eq(0).all() for grad in grads(loss, image, system))
        assert loss.requires_grad


def test_batch_of_one_equals_its_part_of_a_mean() -> None:
    single = [attention_share_loss(IMAGE[:, b : b + 1], SYSTEM[:, b : b + 1], QUERIES[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(attention_share_loss(IMAGE, SYSTEM, QUERIES), (single[0] + single[1]) / 2)


@pytest.mark.parametrize("target", [0.0, -0.1, 1.1])
def test_target_must_be_a_share(target: float) -> None:
    with pytest.raises(ValueError, match="expected a share"):
        attention_share_loss(IMAGE, SYSTEM, QUERIES, target=target)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="masses have shapes"):
        attention_share_loss(IMAGE, SYSTEM[0], QUERIES)
    with pytest.raises(ValueError, match="num_system has shape"):
        attention_guidance_loss(IMAGE, SYSTEM, QUERIES, NUM_IMAGE, NUM_SYSTEM[:2])
