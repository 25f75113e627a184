import math

import pytest
import torch

from avar_lightning.attention import observe_attention
from avar_lightning.guidance import GamingMonitor, GuidanceConfig, guide
from avar_lightning.roles import Role
from tests.factories import Conversation, make_batch, tiny_vlm


def eager_masses(model, batch):
    """Masses (L, B, H, N) on image and system tokens out of eager attention's N×N weights."""
    weights = torch.stack(model(**batch.inputs, output_attentions=True).attentions).double()
    on = [(batch.role_ids == role).double() for role in (Role.IMAGE, Role.SYSTEM)]
    return [torch.einsum("lbhqk,bk->lbhq", weights, keys) for keys in on]


def guided(config, batch, model):
    with observe_attention(model, batch.role_ids, queries=config.query_roles, layers=config.layers) as record:
        model(**batch.inputs)
    return guide(record, config)


BATCH = make_batch(Conversation(), Conversation(system=5, after=1, response=2), padding_side="left")


@pytest.mark.parametrize("queries", [["user"], ["response"], ["user", "response"]])
def test_published_form_follows_the_formula(queries):
    config = GuidanceConfig(form="published", alpha=0.3, beta=0.2, queries=queries)
    image, system = eager_masses(tiny_vlm("eager"), BATCH)
    terms = {Role.IMAGE: [], Role.SYSTEM: []}
    for b in range(2):
        rows = sum(BATCH.role_ids[b] == Role[name.upper()] for name in queries).bool()
        for role, mass in ((Role.IMAGE, image), (Role.SYSTEM, system)):
            mean_weight = mass[:, b][:, :, rows].mean(dim=-1) / (BATCH.role_ids[b] == role).sum()
            terms[role].append((mean_weight + 1e-6).log().mean())
    enhance, suppress = -sum(terms[Role.IMAGE]) / 2, sum(terms[Role.SYSTEM]) / 2
    output = guided(config, BATCH, tiny_vlm())
    assert output.logs["loss_enhance_img"].item() == pytest.approx(enhance.item(), rel=1e-4)
    assert output.logs["loss_suppress_sys"].item() == pytest.approx(suppress.item(), rel=1e-4)
    assert output.loss.item() == pytest.approx((0.3 * enhance + 0.2 * suppress).item(), rel=1e-4)


@pytest.mark.parametrize(("form", "target"), [("share", None), ("hinge", 0.9)])
def test_bounded_forms_follow_the_formula(form, target):
    image, system = eager_masses(tiny_vlm("eager"), BATCH)
    losses, shares = [], []
    for b in range(2):
        rows = BATCH.role_ids[b] == Role.RESPONSE
        v, s = (mass[:, b][:, :, rows].mean(dim=-1) for mass in (image, system))
        share = v / (v + s)
        shares.append(share.mean())
        losses.append((-share.log() if target is None else (target - share).clamp(min=0)).mean())
    output = guided(GuidanceConfig(form=form, weight=0.5, target=0.9), BATCH, tiny_vlm())
    assert output.loss.item() == pytest.approx(0.5 * (sum(losses) / 2).item(), rel=1e-4)
    assert output.logs["image_share"].item() == pytest.approx((sum(shares) / 2).item(), rel=1e-4)


@pytest.mark.parametrize("form", ["published", "share", "hinge"])
def test_samples_without_image_or_system_contribute_nothing(form):
    whole = Conversation()
    config = GuidanceConfig(form=form, target=0.99)
    one = make_batch(whole)
    alone = guided(config, one, tiny_vlm()).loss
    for lacking in (Conversation(images=0), Conversation(system=0), Conversation(response=0)):
        if form == "published" and lacking.response:
            continue  # its two terms need different sets; test_losses has them one by one
        batch = make_batch(whole, lacking)
        batch.inputs["pixel_values"][: len(one.inputs["pixel_values"])] = one.inputs["pixel_values"]
        torch.testing.assert_close(guided(config, batch, tiny_vlm()).loss, alone)
    nothing = guided(config, make_batch(Conversation(images=0, system=0)), tiny_vlm()).loss
    assert nothing.item() == 0
    nothing.backward()  # a rank without images still takes part in the backward of the others


def test_guidance_moves_attention_to_the_image():
    model = tiny_vlm().train()
    config = GuidanceConfig(form="share", weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shares = []
    for _ in range(15):
        output = guided(config, BATCH, model)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(output.logs["image_share"].item())
    assert shares[-1] > shares[0] + 0.1


@pytest.mark.parametrize(
    ("options", "active"),
    [
        ({"form": "none"}, False),
        ({"form": "published", "alpha": 0.0, "beta": 0.0}, False),
        ({"form": "published", "alpha": 0.0}, True),
        ({"form": "share", "weight": 0.0}, False),
        ({"form": "hinge"}, True),
    ],
)
def test_active(options, active):
    assert GuidanceConfig(**options).active is active


@pytest.mark.parametrize(
    ("options", "words"),
    [({"alpha": -1.0}, "alpha=-1.0"), ({"target": 1.5}, "target=1.5"), ({"queries": []}, "queries is empty")],
)
def test_meaningless_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GuidanceConfig(**options)


def warnings_of(losses, masses):
    monitor = GamingMonitor(window=5)
    return [message for pair in zip(losses, masses) if (message := monitor.update(*pair))]


def test_gaming_is_noticed_once():
    steps = range(60)
    collapse = [0.3 * math.exp(-0.3 * step) for step in steps]
    rising = [1 + 0.05 * step for step in steps]
    messages = warnings_of(rising, collapse)
    assert len(messages) == 1
    assert "Guidance is being gamed" in messages[0]


def test_neither_signal_alone_is_gaming():
    steps = range(60)
    collapse = [0.3 * math.exp(-0.3 * step) for step in steps]
    assert warnings_of([1 - 0.01 * step for step in steps], collapse) == []
    assert warnings_of([1 + 0.05 * step for step in steps], [0.3] * 60) == []


def test_gaming_is_noticed_within_a_run_as_short_as_the_demo():
    masses = [0.3] * 10 + [1e-9] * 35
    losses = [1.0] * 20 + [1 + 0.05 * step for step in range(25)]
    monitor = GamingMonitor()
    assert any(monitor.update(*pair) for pair in zip(losses, masses))


def test_batches_without_system_tokens_are_no_collapse():
    masses = [0.3, 0.0] * 30
    assert warnings_of([1 + 0.05 * step for step in range(60)], masses) == []
