"""Guidance beside a fused kernel is that of the attention which eager attention returns."""

import pytest
import torch

from avar_lightning.attention import observe_attention
from avar_lightning.attention.reference import mass_of_probabilities
from avar_lightning.data import Collator
from avar_lightning.guidance import GuidanceConfig, guide
from avar_lightning.processing import padding_id
from avar_lightning.roles import Role
from tests.attention import oracle  # noqa: F401 - registers the eager function under its name
from tests.families.conftest import ALL
from tests.families.samples import KINDS

CONFIG = GuidanceConfig(form="published", queries=["user", "response"])


def eager_guidance(model, inputs, roles):
    """The published formula, sample by sample, on the probabilities of every layer that attends to the tokens."""
    attentions = model(**inputs, output_attentions=True).attentions
    attentions = [a for a in attentions if a is not None and a.shape[-1] == roles.shape[1]]
    queries = torch.isin(roles, torch.tensor([Role.USER, Role.RESPONSE]))
    enhance, suppress = [], []
    for sample in range(len(roles)):
        counts = [int((roles[sample] == key).sum()) for key in (Role.IMAGE, Role.SYSTEM)]
        for layer in attentions:
            mass = mass_of_probabilities(layer, roles, (Role.IMAGE, Role.SYSTEM))[sample][:, queries[sample]].mean(1)
            if counts[0]:
                enhance.append(-(mass[:, 0] / counts[0] + CONFIG.eps).log().mean())
            if counts[1]:
                suppress.append((mass[:, 1] / counts[1] + CONFIG.eps).log().mean())
    return CONFIG.alpha * torch.stack(enhance).mean() + CONFIG.beta * torch.stack(suppress).mean()


@pytest.mark.capability("guidance")
@pytest.mark.parametrize("family", ALL, indirect=True)
def test_loss_and_gradients_are_those_of_eager_attention(family):
    batch = Collator(padding_id(family.processor))([family.encode(KINDS[kind]) for kind in ("two", "other")])
    roles = batch.pop("role_ids")
    del batch["columns"]
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    found = []
    for kernel in ("sdpa", "oracle"):
        model = family.model().double()
        # transformers' own eager function takes the softmax in float32, whatever the dtype.
        model.set_attn_implementation({"text_config": kernel})
        if kernel == "sdpa":
            with observe_attention(model, roles, queries=CONFIG.query_roles) as record:
                model(**inputs)
            assert record.layers == family.small.layers
            loss = guide(record, CONFIG).loss
        else:
            loss = eager_guidance(model, inputs, roles)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        found.append((loss.detach(), gradients))
    (ours, own), (theirs, reference) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert own.keys() == reference.keys()
    assert any("visual" in name or "vision" in name for name in own), "guidance trains what sees, too"
    for name, gradient in own.items():
        # Norms take float32 inside, where two sums that differ in their last digit may be rounded apart.
        torch.testing.assert_close(gradient, reference[name], rtol=1e-6, atol=1e-6 * float(reference[name].abs().max()))
