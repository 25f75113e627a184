"""Scoring without whole logits against the model's own logits and loss."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avar_lightning.scoring import ScoringConfig, lm_loss, score_tokens
from tests.factories import Conversation, make_batch, tiny_vlm

BATCH = make_batch(Conversation(), Conversation(images=2, response=7))
LABELS = BATCH.inputs["input_ids"].masked_fill(BATCH.role_ids != 4, -100)
CHUNKED = ScoringConfig(kernel="chunked", chunk_size=3)
MODELS_OWN = ScoringConfig(kernel="whole")


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [CHUNKED, MODELS_OWN], ids=lambda config: config.kernel)
def test_the_loss_and_its_gradients_are_the_models_own(config):
    model, twin = tiny_vlm(), tiny_vlm()
    theirs = twin(**BATCH.inputs, labels=LABELS).loss
    theirs.backward()
    total, count = lm_loss(model, BATCH.inputs, LABELS, config=config)
    (total / count).backward()
    assert count == 11
    torch.testing.assert_close(total / count, theirs)
    wanted = gradients(twin)
    assert gradients(model).keys() == wanted.keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert "forward" not in vars(model.get_output_embeddings())


class Largest(TorchDispatchMode):
    """Keeps the most rows that any tensor over the whole vocabulary had."""

    def __init__(self, num_words):
        super().__init__()
        self.num_words, self.rows = num_words, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.num_words:
                if tensor.shape == (32, self.num_words):  # the head's own weights
                    continue
                self.rows = max(self.rows, tensor.numel() // self.num_words)
        return out


def test_logits_are_never_whole():
    model = tiny_vlm(vocab_size=997)
    seen = {}
    for config in (CHUNKED, MODELS_OWN):
        with Largest(997) as largest:
            total, _ = lm_loss(model, BATCH.inputs, LABELS, config=config)
            total.backward()
        seen[config.kernel] = largest.rows
    assert seen["chunked"] <= CHUNKED.chunk_size
    assert seen["whole"] == LABELS.numel()


def test_positions_without_a_mask_are_neither_computed_nor_told():
    model = tiny_vlm()
    tokens = BATCH.inputs["input_ids"][:, -4:]
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    with torch.no_grad():
        logps, entropy = score_tokens(model, BATCH.inputs, tokens, mask, with_entropy=True, config=CHUNKED)
        logits = model(**BATCH.inputs).logits[:, -5:-1].double()
    expected = logits.log_softmax(2).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(logps.double(), expected * mask, rtol=1e-5, atol=1e-5)
    assert not entropy[~mask].any()


def test_nothing_to_score_still_reaches_every_parameter():
    model = tiny_vlm()
    total, count = lm_loss(model, BATCH.inputs, torch.full_like(LABELS, -100), config=CHUNKED)
    total.backward()
    assert count == 0
    assert total == 0
    found = gradients(model)
    assert "lm_head.weight" in found
    assert not any(gradient.any() for gradient in found.values())


def test_logits_that_change_behind_the_head_are_refused():
    model = tiny_vlm()
    model.forward = lambda *args, forward=model.forward, **kwargs: _softcapped(forward(*args, **kwargs))
    with pytest.raises(ValueError, match=r"behind its head.*set scoring\.kernel to whole"):
        lm_loss(model, BATCH.inputs, LABELS, config=CHUNKED)
    assert "forward" not in vars(model.get_output_embeddings())


def _softcapped(output):
    output.logits = output.logits.tanh()
    return output


def test_liger_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("avar_lightning.losses.liger.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'avar-lightning\[liger\]'"):
        lm_loss(tiny_vlm(), BATCH.inputs, LABELS, config=ScoringConfig(kernel="liger"))


@pytest.mark.gpu
def test_ligers_loss_is_the_chunked_one():
    pytest.importorskip("liger_kernel")
    batch = {name: tensor.cuda() for name, tensor in BATCH.inputs.items()}
    found = []
    for kernel in ("chunked", "liger"):
        model = tiny_vlm().cuda()
        total, _ = lm_loss(model, batch, LABELS.cuda(), config=ScoringConfig(kernel=kernel))
        total.backward()
        found.append((total, gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-2, atol=1e-3, msg=name)
