"""Guided fine-tuning from shards, measured in validation: the whole way that a user takes."""

import lightning as L
import pytest
import torch

from avar_lightning.attention import observe_attention
from avar_lightning.callbacks import VASCallback
from avar_lightning.data import Collator, ShardDataModule, write_shards
from avar_lightning.guidance import GuidanceConfig, guide
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.processing import padding_id
from avar_lightning.roles import Role
from avar_lightning.sft import SFTModule
from tests.families.conftest import ALL
from tests.families.samples import KINDS, sample

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
pytestmark = [pytest.mark.slow, pytest.mark.capability("training")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """All kinds of conversations, and again with other texts."""
    folder = tmp_path_factory.mktemp("shards")
    more = [sample((40, 40), question=f"Is it the picture {n}?", answer="Yes.", key=f"more{n}") for n in range(3)]
    write_shards([*KINDS.values(), *more], folder)
    return str(folder)


@pytest.mark.parametrize("family", ALL, indirect=True)
def test_guided_training_lowers_the_loss_and_validation_measures_attention(family, shards, tmp_path):
    torch.manual_seed(0)
    guidance = GuidanceConfig(form="share", weight=0.15)
    module = SFTModule(VLMConfig(str(family.folder)), guidance, OptimizerConfig(lr=3e-3), max_new_tokens=2)
    data = ShardDataModule(shards, shards, processor=str(family.folder), batch_size=4, num_workers=0)
    callback = VASCallback(num_overlays=2)
    trainer = L.Trainer(
        max_epochs=3,
        default_root_dir=tmp_path,
        callbacks=[callback],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **QUIET,
    )
    trainer.fit(module, data)
    before, after = callback.baseline, callback.latest
    assert after["val/loss"] < before["val/loss"]
    assert {"val/vas", "val/vas_response", "val/accuracy"} <= after.keys()
    # The last measurement is that of the trained weights, one sample at a time.
    model, own = module.model.eval(), []
    for kind in ("one", "two", "dialogue", "other"):
        inputs = dict(family.encode(KINDS[kind]).tensors)
        roles = inputs.pop("role_ids")
        with torch.no_grad(), observe_attention(model, roles) as record:
            model(**inputs)
        own.append(float(record.vas()[0]))
    measured = {row["id"]: row for row in callback._measurement.rows}
    assert [measured[k]["user"]["mean_of_ratios"] for k in ("one", "two", "dialogue", "other")] == pytest.approx(
        own, rel=1e-3
    )


@pytest.mark.parametrize("family", ALL, indirect=True)
def test_gradients_do_not_depend_on_checkpointing(family):
    batch = Collator(padding_id(family.processor))([family.encode(KINDS[kind]) for kind in ("two", "text")])
    roles = batch.pop("role_ids")
    del batch["columns"]
    config, found = GuidanceConfig(form="published", queries=["user", "response"]), []
    for checkpointing in (False, True):
        model = family.model(gradient_checkpointing=checkpointing).train()
        with observe_attention(model, roles, queries=(Role.USER, Role.RESPONSE)) as record:
            loss = model(**batch, use_cache=False).loss
        (loss + guide(record, config).loss).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in found[0].items():
        if plain is None:
            assert found[1][name] is None
        else:
            torch.testing.assert_close(found[1][name], plain, rtol=1e-4, atol=1e-6)
