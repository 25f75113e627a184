"""Log-probabilities of completions in real families: batched, padded, several images, against one forward each."""

import pytest
import torch

from avar_lightning.grpo.policy import completion_batch, completion_logps
from avar_lightning.roles import Role
from tests.factories import PAD, TOKENS_PER_IMAGE, Conversation, make_batch, tiny_vlm


def row(images, seed, **lengths):
    """A prompt as `Encoded.prompt_row` has it."""
    batch = make_batch(Conversation(images=images, response=0, **lengths), seed=seed)
    return {**batch.inputs, "role_ids": batch.role_ids}


ROWS = [row(1, 0), row(3, 1, before=6), row(0, 2, after=1), row(2, 3)]
COMPLETIONS = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([], dtype=torch.long), torch.arange(10, 16)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_batched_equals_one_by_one(temperature):
    model = tiny_vlm()
    batch = completion_batch(ROWS, COMPLETIONS, pad_token_id=PAD, device="cpu")
    with torch.no_grad():
        found, entropy = completion_logps(model, batch, temperature=temperature, with_entropy=True)
    assert batch.completion_mask.sum(1).tolist() == [3, 1, 0, 6]
    for index, (prompt, tokens) in enumerate(zip(ROWS, COMPLETIONS)):
        inputs = {name: value for name, value in prompt.items() if name != "role_ids"}
        count = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens[None])], 1)
        with torch.no_grad():
            logits = model(**inputs).logits[0, count - 1 : -1].double() / temperature
        expected = logits.log_softmax(1)
        mask = batch.completion_mask[index]
        torch.testing.assert_close(
            found[index][mask].double(), expected.gather(1, tokens[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            entropy[index][mask].double(), -(expected.exp() * expected).sum(1), rtol=1e-4, atol=1e-4
        )


def test_every_prompt_keeps_its_own_pictures_and_roles():
    batch = completion_batch(ROWS, COMPLETIONS, pad_token_id=PAD, device="cpu")
    images = [int((roles == Role.IMAGE).sum()) // TOKENS_PER_IMAGE for roles in batch.role_ids]
    assert images == [1, 3, 0, 2]
    assert batch.inputs["image_grid_thw"].shape[0] == 6
    assert [int((roles == Role.RESPONSE).sum()) for roles in batch.role_ids] == [3, 1, 0, 6]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [
        prompt["input_ids"].shape[1] + len(tokens) for prompt, tokens in zip(ROWS, COMPLETIONS)
    ]


def test_no_completion_at_all():
    nothing = [torch.tensor([], dtype=torch.long)] * 2
    batch = completion_batch(ROWS[:2], nothing, pad_token_id=PAD, device="cpu")
    logps, _ = completion_logps(tiny_vlm(), batch)
    assert logps.shape == (2, 1)
    assert not batch.completion_mask.any()


def test_what_a_token_sees_of_pictures_goes_on_behind_the_prompt():
    """Llama-3.2-Vision's mask has a row for each token: (1, N, images, tiles)."""
    prompt = dict(ROWS[0])
    length = prompt["input_ids"].shape[1]
    prompt["cross_attention_mask"] = torch.arange(length)[None, :, None, None].expand(1, length, 1, 4) % 2
    batch = completion_batch([prompt], [torch.tensor([3, 4])], pad_token_id=PAD, device="cpu")
    mask = batch.inputs["cross_attention_mask"]
    assert mask.shape == (1, length + 2, 1, 4)
    assert torch.equal(mask[:, length:], mask[:, length - 1 : length].expand(1, 2, 1, 4))
