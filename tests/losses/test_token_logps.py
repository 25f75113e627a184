"""Chunked log-probabilities against all logits at once, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_lightning.losses import token_logps


def case(num_positions, num_words=13, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(size, num_words).double()
    hidden = torch.randn(num_positions, size, generator=generator, dtype=torch.float64, requires_grad=True)
    return head, hidden, torch.randint(num_words, (num_positions,), generator=generator)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 17), st.integers(1, 20), st.floats(0.3, 3.0))
def test_values_and_gradients_do_not_depend_on_the_chunks(num_positions, chunk_size, temperature):
    head, hidden, tokens = case(num_positions)
    weights = torch.linspace(-1, 2, num_positions, dtype=torch.float64)
    logits = head(hidden) / temperature
    expected = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, head.weight, head.bias])
    found, entropy = token_logps(
        head, hidden, tokens, temperature=temperature, with_entropy=True, chunk_size=chunk_size
    )
    got = torch.autograd.grad((found * weights).sum(), [hidden, head.weight, head.bias])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **close)
    torch.testing.assert_close(entropy.double(), torch.distributions.Categorical(logits=logits).entropy(), **close)
    for ours, theirs in zip(got, wanted):
        torch.testing.assert_close(ours, theirs, **close)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        token_logps(*case(2), chunk_size=0)
