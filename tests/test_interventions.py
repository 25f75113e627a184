"""Schedules, prompts cut out of foreign batches, answers under steering, and paired comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from avar_lightning.attention import Intervention, observe_attention
from avar_lightning.interventions import (
    METRICS,
    UNSTEERED,
    Setting,
    answer,
    columns_of,
    compare,
    grid,
    leave_one_layer_out,
    one_head_each,
    paired_difference,
    prompt_of,
    random_heads,
)
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import load_processor
from avar_lightning.roles import Role
from avar_lightning.vas import visual_attention_score
from tests.attention.families import FAMILIES
from tests.factories import PAD, Conversation, make_batch, tiny_vlm


def test_a_grid_leaves_out_what_changes_nothing() -> None:
    settings = grid([0.0, 0.3], [0.0, 0.4], ["logit", "mass"], layers="0-1")
    assert [setting.name for setting in settings[:3]] == [
        "logit image=0 system=0.4",
        "logit image=0.3 system=0",
        "logit image=0.3 system=0.4",
    ]
    assert len(settings) == 6
    assert all(setting.intervention.layers == "0-1" for setting in settings)


def test_a_grid_has_each_setting_once() -> None:
    with pytest.raises(ValueError, match=r"logit image=0\.3 system=0 is in the grid more than once"):
        grid([0.3, 0.3000000001], [0.0], ["logit"])


def test_one_layer_is_left_out_at_a_time() -> None:
    settings = leave_one_layer_out(Intervention(layers="2-4"), range(8))
    assert [setting.intervention.layers for setting in settings] == [(2, 3, 4), (3, 4), (2, 4), (2, 3)]
    without_cross_attention = leave_one_layer_out(Intervention(), (0, 2, 3))
    assert [setting.intervention.layers for setting in without_cross_attention] == [(0, 2, 3), (2, 3), (0, 3), (0, 2)]
    with pytest.raises(ValueError, match=r"layers is \[3\], expected two or more"):
        leave_one_layer_out(Intervention(layers="3"), range(8))
    with pytest.raises(ValueError, match="leave heads unset"):
        leave_one_layer_out(Intervention(heads={0: [1]}), range(8))


def test_heads_one_by_one_and_at_random() -> None:
    alone = [s.intervention.heads for s in one_head_each(Intervention(layers=[1]), range(4), 3)]
    assert alone == [{1: (0,)}, {1: (1,)}, {1: (2,)}]
    of_these = [s.intervention.heads for s in one_head_each(Intervention(heads={2: [1], 0: [0, 2]}), range(4), 3)]
    assert of_these == [{0: (0,)}, {0: (2,)}, {2: (1,)}]
    chosen, *control = random_heads(Intervention(heads={0: [1], 2: [0, 2]}), (0, 2, 3), 3, repeats=20, seed=1)
    assert chosen.intervention.heads == {0: [1], 2: [0, 2]}
    drawn = [sorted((layer, h) for layer, heads in s.intervention.heads.items() for h in heads) for s in control]
    assert {len(set(heads)) for heads in drawn} == {3}
    everything = {(layer, head) for layer in (0, 2, 3) for head in range(3)}
    assert {head for heads in drawn for head in heads} == everything - {(0, 1), (2, 0), (2, 2)}
    many = {0: [0, 1, 2], 2: [0, 2]}  # of which the others are too few
    _, *crowded = random_heads(Intervention(heads=many), (0, 2, 3), 3, repeats=20, seed=1)
    assert {(layer, h) for s in crowded for layer, heads in s.intervention.heads.items() for h in heads} == everything
    again = random_heads(Intervention(heads={0: [1], 2: [0, 2]}), (0, 2, 3), 3, repeats=20, seed=1)
    assert [s.intervention.heads for s in again[1:]] == [s.intervention.heads for s in control]
    with pytest.raises(ValueError, match="control for chosen ones"):
        random_heads(Intervention(), range(4), 3, repeats=1)


# What other projects' batches carry beside the model's arguments.
FOREIGN = {"answer": ["a", "b", "c"], "id": [1, 2, 3], "prompt": ["text"] * 3, "question_type": torch.arange(3)}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_prompt_is_what_stands_before_the_last_response(padding_side: str) -> None:
    conversations = (Conversation(), Conversation(images=2, response=2), Conversation(images=0, response=1))
    batch = make_batch(*conversations, padding_side=padding_side)
    prompt = prompt_of(batch.inputs | FOREIGN | {"labels": batch.role_ids}, batch.role_ids, tiny_vlm(), PAD)
    assert prompt.keys() == batch.inputs.keys() | {"role_ids"}
    assert prompt["pixel_values"] is batch.inputs["pixel_values"]
    for index, conversation in enumerate(conversations):
        real = batch.inputs["attention_mask"][index].bool()
        ids, roles = batch.inputs["input_ids"][index][real], batch.role_ids[index][real]
        length = len(ids) - conversation.response
        padding = prompt["input_ids"].shape[1] - length
        assert prompt["input_ids"][index].tolist() == [PAD] * padding + ids[:length].tolist()
        assert prompt["role_ids"][index].tolist() == [0] * padding + roles[:length].tolist()
        assert prompt["attention_mask"][index].tolist() == [0] * padding + [1] * length


def test_only_the_last_of_several_turns_is_cut_off() -> None:
    roles = torch.tensor([[1, 2, 4, 4, 0, 2, 0, 4, 4]])
    prompt = prompt_of({"input_ids": torch.arange(9)[None]}, roles, tiny_vlm(), 99)
    assert prompt["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_a_sequence_of_more_dimensions_is_cut_and_padded_too() -> None:
    model, (inputs, roles) = FAMILIES["Llama-3.2-Vision"].build(), FAMILIES["Llama-3.2-Vision"].make()
    roles[0, -3] = Role.RESPONSE  # so that the prompts differ in length
    inputs["cross_attention_mask"] = torch.arange(roles.numel()).view(*roles.shape, 1, 1)
    prompt = prompt_of(inputs, roles, model, PAD)
    for index in range(2):
        real = inputs["attention_mask"][index].bool() & (roles[index] != Role.RESPONSE)
        kept = inputs["cross_attention_mask"][index][real].flatten().tolist()
        assert prompt["cross_attention_mask"][index].flatten().tolist()[-len(kept) :] == kept


def test_a_prompt_without_roles_is_refused() -> None:
    batch = make_batch()
    own = {"input_ids": batch.inputs["input_ids"]}
    with pytest.raises(ValueError, match="has no 'role_ids'"):
        prompt_of(batch.inputs | {"prompt": own}, batch.role_ids, tiny_vlm(), PAD)


@pytest.fixture(scope="module")
def demo():
    torch.manual_seed(0)
    return load_model(VLMConfig("demo", from_scratch=True)).eval(), load_processor("demo")


@pytest.fixture
def batch(make_data):
    return next(iter(make_data(val_batch_size=4).val_dataloader()))


def test_answers_are_the_model_s_own_and_vas_that_of_their_tokens(demo, batch) -> None:
    model, processor = demo
    prompt = prompt_of(batch, batch["role_ids"], model, processor.tokenizer.pad_token_id)
    options = {"processor": processor, "max_new_tokens": 6, "columns": batch["columns"]}
    rows = answer(model, prompt, UNSTEERED, **options)
    inputs = {name: value for name, value in prompt.items() if name != "role_ids"}
    placeholders = [model.config.image_token_id, model.config.video_token_id]
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=placeholders)
    new = tokens[:, prompt["input_ids"].shape[1] :]
    assert [row["completion"] for row in rows] == processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert [row["id"] for row in rows] == [column["id"] for column in batch["columns"]]

    with observe_attention(model, prompt["role_ids"], queries=(Role.USER, Role.RESPONSE)) as record, torch.no_grad():
        model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=placeholders)
    image, system = record.mass_of(Role.IMAGE), record.mass_of(Role.SYSTEM)
    user = visual_attention_score(image, system, record.query_mask(Role.USER))
    torch.testing.assert_close(torch.tensor([row["vas"] for row in rows]), user)
    steered = answer(model, prompt, Setting("s", Intervention(2.0, 0.9, "mass")), **options)
    # Probabilities of image tokens times 3 and of system tokens times 0.1, renormalised: exactly 30 times the ratio
    # in the first layer; later layers see other inputs.
    assert all(b["vas_ratio_of_means"] > 3 * a["vas_ratio_of_means"] for a, b in zip(rows, steered, strict=True))


def test_padding_behind_an_answer_is_not_measured() -> None:
    model = tiny_vlm()
    model.generation_config.eos_token_id = None
    batch = make_batch(Conversation(response=0), Conversation(response=0, images=2, after=5), padding_side="left")
    prompt = batch.inputs | {"role_ids": batch.role_ids}
    columns = [{"answer": "x"}, {"answer": "y"}]

    class Tokenizer:
        pad_token_id, eos_token_id = PAD, -1

        def batch_decode(self, tokens: torch.Tensor, **_: bool) -> list[str]:
            return [" ".join(map(str, row)) for row in tokens.tolist()]

    def scores(tokenizer: Tokenizer, length: int) -> dict:
        rows = answer(model, prompt, UNSTEERED, processor=tokenizer, max_new_tokens=length, columns=columns)
        return rows[0]

    tokenizer = Tokenizer()
    tokens = [int(token) for token in scores(tokenizer, 8)["completion"].split()]
    end = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    whole, cut = scores(tokenizer, 8), scores(tokenizer, end + 2)
    # From now on it ends the answer, and padding follows: by the model's own settings, as in Gemma 3.
    model.generation_config.eos_token_id = [tokens[end]]
    ended = scores(tokenizer, 8)
    assert ended["completion"].split()[end + 1 :] == [str(PAD)] * (7 - end)
    assert ended["vas_response"] == pytest.approx(cut["vas_response"], rel=1e-4)
    assert ended["vas_response"] != pytest.approx(whole["vas_response"], rel=1e-2)


def test_columns_come_from_the_batch_or_from_its_own_response(demo, batch) -> None:
    _, processor = demo
    assert columns_of(batch, batch["role_ids"], processor) == batch["columns"]
    assert columns_of({"input_ids": 0, "answer": ["a", "b"]}, batch["role_ids"][:2], processor) == [
        {"answer": "a"},
        {"answer": "b"},
    ]
    bare = {"input_ids": batch["input_ids"]}
    found = [column["answer"] for column in columns_of(bare, batch["role_ids"], processor)]
    assert found == [column["answer"] for column in batch["columns"]]


def test_samples_without_an_answer_have_no_accuracy(demo, batch) -> None:
    model, processor = demo
    prompt = prompt_of(batch, batch["role_ids"], model, processor.tokenizer.pad_token_id)
    columns = [{"answer": "x"}, {"answer": None}, {}, {"answer": ""}]
    rows = answer(model, prompt, UNSTEERED, processor=processor, max_new_tokens=1, columns=columns)
    assert [math.isnan(row["accuracy"]) for row in rows] == [False, True, True, True]


def test_rewards_get_every_column(demo, batch) -> None:
    model, processor = demo
    prompt = prompt_of(batch, batch["role_ids"], model, processor.tokenizer.pad_token_id)
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.25] * len(completions)

    options = {"processor": processor, "max_new_tokens": 1, "columns": batch["columns"], "reward": reward}
    rows = answer(model, prompt, UNSTEERED, **options)
    assert [row["accuracy"] for row in rows] == [0.25] * 4
    assert seen["task"] == [column["task"] for column in batch["columns"]]


def test_paired_difference_by_hand() -> None:
    before, after = [0.0, 1.0, math.nan, 0.0], [1.0, 1.0, 1.0, math.inf]
    found = paired_difference(before, after)
    assert (found.mean, found.num_pairs) == (0.5, 2)
    assert (found.low, found.high) == (0.0, 1.0)
    assert not found.significant
    certain = paired_difference([0.0] * 9, [1.0] * 9)
    assert (certain.low, certain.high, certain.significant) == (1.0, 1.0, True)
    nothing = paired_difference([math.nan], [1.0])
    assert math.isnan(nothing.mean)
    assert not nothing.significant
    with pytest.raises(ValueError, match="expected pairs"):
        paired_difference([1.0], [1.0, 2.0])


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    change = np.random.default_rng(0).normal(0.3, 1.0, 400)
    found = paired_difference(np.zeros(400), change)
    half = 1.96 * change.std(ddof=1) / 20
    assert found.low == pytest.approx(change.mean() - half, abs=0.015)
    assert found.high == pytest.approx(change.mean() + half, abs=0.015)


def test_models_that_share_their_samples_are_drawn_together() -> None:
    change = np.random.default_rng(0).normal(0.3, 1.0, 100)
    one = paired_difference(np.zeros(100), change)
    five = paired_difference(np.zeros((5, 100)), np.tile(change, (5, 1)))
    assert (five.mean, five.low, five.high) == pytest.approx((one.mean, one.low, one.high))
    assert five.num_pairs == 500


def test_compare_takes_means_over_models_and_samples() -> None:
    def rows(*accuracies: float) -> list[dict[str, float]]:
        return [dict.fromkeys(METRICS, math.nan) | {"accuracy": value} for value in accuracies]

    result = compare([rows(0, 0), rows(1, 0)], [rows(1, 0), rows(1, 1)])
    assert result["accuracy"] == 0.75
    assert result["accuracy_sd"] == pytest.approx(math.sqrt(0.125))
    assert result["accuracy_difference"].mean == 0.5
    assert math.isnan(result["vas"])
