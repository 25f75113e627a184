"""One batch of reinforcement learning: sampled by the model, rewarded for looking, learned from."""

import lightning as L
import pytest
import torch

from avar_lightning.data import ShardDataModule, write_shards
from avar_lightning.families import placeholder_ids
from avar_lightning.grpo import GRPOConfig, GRPOModule
from avar_lightning.grpo.policy import completion_batch, completion_logps
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.processing import padding_id
from avar_lightning.rewards import RewardConfig, VisualAttentionReward
from avar_lightning.rollout import SamplingConfig
from tests.families.conftest import ALL
from tests.families.samples import KINDS

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
pytestmark = [pytest.mark.capability("GRPO"), pytest.mark.parametrize("family", ALL, indirect=True)]


def right(completions, completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]


def test_a_step_samples_rewards_and_learns(family, tmp_path):
    write_shards([KINDS[kind] for kind in ("one", "two", "text")], tmp_path)
    module = GRPOModule(
        VLMConfig(str(family.folder)),
        GRPOConfig(num_generations=4, micro_batch_size=5, num_minibatches=2),
        SamplingConfig(max_new_tokens=4, seed=1),
        [RewardConfig(right, name="accuracy")],
        VisualAttentionReward(transform="share"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_fraction=0.0),
    )
    data = ShardDataModule(str(tmp_path), processor=str(family.folder), batch_size=3, num_workers=0, train_prompts=True)
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    before = {name: p.clone() for name, p in family.model().named_parameters()}
    trainer.fit(module, data)
    rollouts = module.rollouts
    assert trainer.global_step == 2
    assert any(not p.equal(before[name]) for name, p in module.model.named_parameters())
    forbidden = set(placeholder_ids(module.model.config))
    assert not any(forbidden & set(ids.tolist()) for ids in rollouts.token_ids)
    # Where an answer is right and there is a picture, looking at it is worth something; without one, nothing.
    for index, (accuracy, visual) in enumerate(zip(rollouts.rewards["accuracy"], rollouts.rewards["visual"])):
        has_image = rollouts.columns[index // 4]["id"] != "text"
        assert (visual > 0) == bool(accuracy and has_image)
    assert trainer.callback_metrics["rollout/vas"].isfinite()


@pytest.mark.slow
@torch.no_grad()
def test_log_probabilities_are_those_of_single_eager_forwards(family):
    model = family.model().double()
    rows = [family.encode(KINDS[kind], prompt_only=True).prompt_row for kind in ("one", "two", "text", "other")]
    rows = [{name: x.double() if x.is_floating_point() else x for name, x in row.items()} for row in rows]
    pad = padding_id(family.processor)
    tokens = [torch.randint(5, 60, (length,)) for length in (3, 6, 1, 4)]
    together, _ = completion_logps(model, completion_batch(rows, tokens, pad_token_id=pad, device="cpu"))
    alone = family.model(attn_implementation="eager").double()
    for row, own, ours in zip(rows, tokens, together):
        ids = torch.cat([row["input_ids"], own[None]], 1)
        inputs = {name: value for name, value in row.items() if name not in ("role_ids", "input_ids")}
        inputs["attention_mask"] = torch.ones_like(ids)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in row:
                inputs[name] = torch.cat([row[name], torch.zeros_like(own[None])], 1)
        if "cross_attention_mask" in row:
            mask = row["cross_attention_mask"]
            inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(own), -1, -1)], 1)
        logits = alone(input_ids=ids, **inputs).logits[0, -len(own) - 1 : -1]
        theirs = logits.log_softmax(1).gather(1, own[:, None])[:, 0]
        torch.testing.assert_close(ours[: len(own)].double(), theirs, rtol=1e-5, atol=1e-5)
