"""A sample is the same alone and beside others: positions, masks and pictures stay with whom they belong."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from avar_lightning.attention import observe_attention
from avar_lightning.data import Collator
from avar_lightning.processing import padding_id
from avar_lightning.roles import Role
from tests.families.conftest import ALL
from tests.families.samples import KINDS

SLOW = [("one", "other"), ("one", "text"), ("text", "text")]
GROUPS = [("two", "one", "text"), *(pytest.param(kinds, marks=pytest.mark.slow) for kinds in SLOW)]


@torch.no_grad()
def measured(model, batch):
    """Loss of each sample, and its VAS over user and response tokens."""
    del batch["columns"]
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    roles, labels = batch.pop("role_ids"), batch.pop("labels")
    with observe_attention(model, roles, queries=(Role.USER, Role.RESPONSE)) as record:
        logps = model(**batch).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = logps.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    return -picked.sum(1), record.vas()


@pytest.mark.capability("batches")
@pytest.mark.parametrize("family", ALL, indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kinds", GROUPS, ids="+".join)
def test_a_sample_is_the_same_alone_and_in_a_batch(family, side, kinds):
    model = family.model().double()
    collate = Collator(padding_id(family.processor), side)
    samples = [family.encode(KINDS[kind]) for kind in kinds]

    losses, vas = measured(model, collate(samples))
    for index, sample in enumerate(samples):
        loss, own = measured(model, collate([sample]))
        torch.testing.assert_close(losses[index], loss[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vas[index], own[0], rtol=1e-4, atol=1e-4, equal_nan=True)
        assert vas[index].isnan() == (not sample.tensors["role_ids"].eq(Role.IMAGE).any())


@pytest.mark.slow
@pytest.mark.capability("batches")
@pytest.mark.parametrize("family", ALL, indirect=True)
@torch.no_grad()
def test_a_sample_alone_is_what_transformers_computes(family):
    for kind in ("one", "two", "text"):
        inputs = {name: value for name, value in family.encode(KINDS[kind]).tensors.items() if name != "role_ids"}
        theirs = AutoModelForImageTextToText.from_pretrained(family.folder)(**inputs)
        ours = family.model()(**inputs)
        assert ours.logits.equal(theirs.logits)
        assert ours.loss.equal(theirs.loss)
