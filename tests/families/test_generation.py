"""Answers with a cache are those without, and hold no token that stands for a picture."""

import pytest
import torch

from avar_lightning.data import Collator
from avar_lightning.families import placeholder_ids
from avar_lightning.processing import padding_id
from tests.families.conftest import ALL
from tests.families.samples import KINDS

LENGTH = 5


@torch.no_grad()
def without_cache(model, row, forbidden):
    """Greedy tokens from whole forwards of one unpadded sample, and their logits."""
    row = {name: value for name, value in row.items() if name != "role_ids"}
    tokens, logits = [], []
    for _ in range(LENGTH):
        last = model(**row, use_cache=False).logits[0, -1]
        logits.append(last.clone())
        allowed = torch.tensor([i for i in forbidden if i < len(last)], dtype=torch.long)
        token = last.index_fill(0, allowed, -torch.inf).argmax()[None, None]
        tokens.append(int(token))
        shape = row["input_ids"].shape
        for name, value in list(row.items()):
            if name == "input_ids":
                row[name] = torch.cat([value, token], 1)
            elif value.shape[:2] == shape:
                more = value[:, -1:] if value.ndim > 2 or name == "attention_mask" else torch.zeros_like(value[:, -1:])
                row[name] = torch.cat([value, more], 1)
    return tokens, torch.stack(logits)


@pytest.mark.slow
@pytest.mark.capability("generation")
@pytest.mark.parametrize("family", ALL, indirect=True)
@pytest.mark.parametrize("kinds", [("one", "other"), ("two", "one"), ("text", "text")], ids="+".join)
def test_cached_answers_of_a_padded_batch_are_those_of_whole_forwards(family, kinds):
    model = family.model().double()
    forbidden = placeholder_ids(model.config)
    rows = [family.encode(KINDS[kind], prompt_only=True).prompt_row for kind in kinds]
    rows = [{name: x.double() if x.is_floating_point() else x for name, x in row.items()} for row in rows]
    batch = Collator(padding_id(family.processor)).merge(rows, "left")
    del batch["role_ids"]
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
    made = model.generate(**batch, **options, suppress_tokens=forbidden, output_logits=True, pad_token_id=0)
    new = made.sequences[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(new, torch.tensor(forbidden)).any()
    for index, row in enumerate(rows):
        tokens, logits = without_cache(model, row, forbidden)
        assert new[index].tolist() == tokens
        torch.testing.assert_close(torch.stack(made.logits, 1)[index], logits, rtol=1e-6, atol=1e-6, check_dtype=False)
