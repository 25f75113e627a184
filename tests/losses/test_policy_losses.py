"""Policy losses: worked by hand, by law, and against TRL's trainer on the same tensors."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_lightning.losses import POLICY_LOSSES, group_advantages, grpo_loss, importance_weights, kl_divergence


def logs(*values):
    return torch.tensor([[math.log(value) for value in row] for row in values])


def tensors(batch=6, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(batch, length, generator=generator, dtype=torch.float64) * 3
    new = (old + 0.6 * torch.randn(batch, length, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = old + 0.4 * torch.randn(batch, length, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([length, 1, 3, length, 2, 4])[:batch]
    mask = torch.arange(length) < lengths[:, None]
    advantages = torch.randn(batch, generator=generator, dtype=torch.float64)
    return new, old, reference, mask, advantages


def test_advantages_by_hand():
    advantages, differ = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3]), 4)
    deviation = math.sqrt((4 * 0.25) / 3)
    expected = [sign * 0.5 / (deviation + 1e-4) for sign in (1, -1, -1, 1)] + [0.0] * 4
    torch.testing.assert_close(advantages, torch.tensor(expected))
    assert differ.tolist() == [True, False]


@given(st.lists(st.integers(-40, 40), min_size=4, max_size=4), st.floats(0.125, 8), st.floats(-10, 10))
def test_advantages_sum_to_zero_and_know_no_scale(eighths, factor, shift):
    rewards = torch.tensor(eighths, dtype=torch.float64) / 8
    advantages, differ = group_advantages(rewards, 4, eps=0.0)
    assert abs(float(advantages.sum())) < 1e-6
    moved, _ = group_advantages(rewards * factor + shift, 4, eps=0.0)
    if differ.all():
        torch.testing.assert_close(moved, advantages, rtol=1e-6, atol=1e-6)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="num_generations=1"):
        group_advantages(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="5 rewards"):
        group_advantages(torch.zeros(5), 2)


def test_losses_by_hand():
    """Two completions of 2 and 1 tokens; ratios 1.5, 0.5 and 0.5; advantages 1 and -1; clipped to [0.8, 1.2]."""
    new, old = logs([0.6, 0.2], [0.2, 1.0]), logs([0.4, 0.4], [0.4, 1.0])
    mask, advantages = torch.tensor([[True, True], [True, False]]), torch.tensor([1.0, -1.0])
    first, second = -1.2, -0.5  # the first token is clipped, the second (below 1, raised) is not
    third = 0.8  # lowered below 1 - 0.2: clipped
    expected = {
        "grpo": ((first + second) / 2 + third) / 2,
        "dapo": (first + second + third) / 3,
        "dr_grpo": ((first + second) / 4 + third / 4) / 2,
        # geometric means sqrt(0.75) and 0.5
        "gspo": (-math.sqrt(0.75) + 0.8) / 2,
    }
    for loss_type, value in expected.items():
        out = grpo_loss(new, old, advantages, mask, loss_type=loss_type, max_length=4)
        assert float(out.loss) == pytest.approx(value, rel=1e-5), loss_type
    out = grpo_loss(new, old, advantages, mask)
    assert float(out.clip_fraction_high) == pytest.approx(1 / 3)
    assert float(out.clip_fraction_low) == pytest.approx(1 / 3)
    out = grpo_loss(new, old, advantages, mask, loss_type="gspo")
    assert (float(out.clip_fraction_low), float(out.clip_fraction_high)) == (0.5, 0.0)


def test_clip_higher_follows_the_ratio_further():
    new, old = logs([0.65]), logs([0.5])
    for clip_high, value in ((0.2, -1.2), (0.28, -1.28), (0.4, -1.3)):
        out = grpo_loss(new, old, torch.tensor([1.0]), torch.tensor([[True]]), clip_high=clip_high)
        assert float(out.loss) == pytest.approx(value)


def test_kl_by_hand_is_never_negative_and_is_added():
    new, reference = logs([0.5, 0.5]), logs([0.25, 1.0])
    expected = [0.5 - math.log(0.5) - 1, 2 - math.log(2) - 1]
    torch.testing.assert_close(kl_divergence(new, reference), torch.tensor([expected]))
    out = grpo_loss(
        new, new, torch.tensor([0.0]), torch.tensor([[True, True]]), beta=0.1, ref_per_token_logps=reference
    )
    assert float(out.loss) == pytest.approx(0.1 * sum(expected) / 2)
    assert float(out.kl) == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_at_the_start_the_gradient_is_that_of_the_policy_gradient(loss_type):
    new, _, _, mask, advantages = tensors()
    grpo_loss(new, new.detach(), advantages, mask, loss_type=loss_type, max_length=7).loss.backward()
    lengths = mask.sum(1, keepdim=True)
    per_token = {
        "grpo": 1 / lengths / 6,
        "gspo": 1 / lengths / 6,
        "dapo": 1 / mask.sum(),
        "dr_grpo": torch.tensor(1 / (6 * 7)),
    }[loss_type]
    torch.testing.assert_close(new.grad, -(advantages[:, None] * mask * per_token))


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_parts_sum_to_the_whole(loss_type):
    new, old, reference, mask, advantages = tensors()
    options = {"loss_type": loss_type, "beta": 0.05, "max_length": 5}
    whole = grpo_loss(new, old, advantages, mask, ref_per_token_logps=reference, **options)
    parts = [
        grpo_loss(
            new[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            ref_per_token_logps=reference[rows],
            num_completions=6,
            num_tokens=mask.sum(),
            **options,
        ).loss
        for rows in ([0, 1, 2], [3], [4, 5])
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_padding_and_empty_completions_change_nothing(loss_type):
    new, old, _, mask, advantages = tensors()
    out = grpo_loss(new, old, advantages, mask, loss_type=loss_type, max_length=5)
    dirty = [torch.where(mask, values.detach(), 50.0 * index) for index, values in enumerate((new, old))]
    again = grpo_loss(*dirty, advantages, mask, loss_type=loss_type, max_length=5)
    torch.testing.assert_close(again.loss, out.loss.detach())
    nothing = grpo_loss(new, old, advantages, torch.zeros_like(mask), loss_type=loss_type)
    assert float(nothing.loss.detach()) == 0.0
    nothing.loss.backward()
    assert bool((new.grad == 0).all())


def test_importance_weights_by_hand():
    ours, theirs = logs([0.5, 0.3, 0.9]), logs([0.4, 0.1, 0.3])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(importance_weights(ours, theirs, mask), torch.tensor([[1.25, 2.0, 1.0]]))
    whole = importance_weights(ours, theirs, mask, level="sequence", cap=10.0)
    torch.testing.assert_close(whole, torch.tensor([[3.75, 3.75, 1.0]]))
    assert importance_weights(ours, theirs, mask, level="none").eq(1).all()
    impossible = torch.full_like(theirs, -math.inf)
    assert importance_weights(ours, impossible, mask).isfinite().all()


def test_bad_arguments_are_refused():
    new, old, _, mask, advantages = tensors()
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        grpo_loss(new, old, advantages, mask, loss_type="ppo")
    with pytest.raises(ValueError, match="needs ref_per_token_logps"):
        grpo_loss(new, old, advantages, mask, beta=0.1)
    with pytest.raises(ValueError, match="importance level is 'word'"):
        importance_weights(new, old, mask, level="word")


def trl_loss(new, old, reference, mask, advantages, *, loss_type, beta, low, high, max_length, weights):
    """What TRL's GRPOTrainer computes; its forward is replaced by the given log-probabilities."""
    from trl.trainer import grpo_trainer as trainer_module

    trainer = object.__new__(trainer_module.GRPOTrainer)
    gspo = loss_type == "gspo"
    trainer.__dict__ |= {
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "loss_type": "grpo" if gspo else loss_type,
        "importance_sampling_level": "sequence" if gspo else "token",
        "beta": beta,
        "epsilon_low": low,
        "epsilon_high": high,
        "max_completion_length": max_length,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "use_vllm": weights is not None,
        "vllm_importance_sampling_correction": weights is not None,
        "tools": None,
        "current_gradient_accumulation_steps": 1,
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value
        ),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": __import__("collections").defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (new, torch.zeros_like(new), None),
    }
    ids = torch.zeros_like(new, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.to(new.dtype),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    return trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_parity_with_trl(loss_type, beta, weighted):
    for seed in range(3):
        new, old, reference, mask, advantages = tensors(seed=seed)
        weights = importance_weights(old, reference, mask) if weighted else None
        options = {"loss_type": loss_type, "beta": beta}
        theirs = trl_loss(
            new, old, reference, mask, advantages, low=0.2, high=0.28, max_length=9, weights=weights, **options
        )
        (their_gradient,) = torch.autograd.grad(theirs, new)
        ours = grpo_loss(
            new,
            old,
            advantages,
            mask,
            ref_per_token_logps=reference,
            clip_high=0.28,
            max_length=9,
            weights=weights,
            **options,
        ).loss
        (our_gradient,) = torch.autograd.grad(ours, new)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(POLICY_LOSSES))
def test_gradient_agrees_with_finite_differences(seed, loss_type):
    new, old, reference, mask, advantages = tensors(seed=seed)

    def loss(values):
        return grpo_loss(
            values, old, advantages, mask, loss_type=loss_type, beta=0.1, ref_per_token_logps=reference, max_length=5
        ).loss

    (gradient,) = torch.autograd.grad(loss(new), new)
    direction = torch.randn(new.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = 1e-7
    slope = (loss(new + step * direction) - loss(new - step * direction)) / (2 * step)
    # A ratio within the step of its bound has no derivative there; such a draw is rare and not what is tested.
    assert float((gradient * direction).sum().detach()) == pytest.approx(float(slope.detach()), rel=1e-4, abs=1e-6)
