"""Greedy answers against a loop of argmax, with a checkpoint whose own settings ask for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from avar_lightning import SFTModule
from avar_lightning.interventions import UNSTEERED, answer, prompt_of
from avar_lightning.model import VLMConfig, end_ids

LENGTH = 10
ASKED_OTHERWISE = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 1,
    "min_new_tokens": LENGTH,
    "bad_words_ids": [[5]],
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module")
def module() -> SFTModule:
    module = SFTModule(VLMConfig("demo", from_scratch=True), max_new_tokens=LENGTH)
    torch.manual_seed(0)
    module.configure_model()
    module.eval()
    for name, value in ASKED_OTHERWISE.items():
        setattr(module.model.generation_config, name, value)
    return module


@pytest.fixture
def batch(make_data: Any) -> dict[str, Any]:
    return next(iter(make_data(val_batch_size=3).val_dataloader()))


@torch.no_grad()
def likeliest(model: Any, prompt: dict[str, Any], ends: list[int], penalty: float = 1.0) -> list[list[int]]:
    """The answers of one forward of everything after the other."""
    config = model.config
    inputs = {name: value for name, value in prompt.items() if name != "role_ids"}
    answers: list[list[int]] = [[] for _ in inputs["input_ids"]]
    for _ in range(LENGTH):
        logits = model(**inputs).logits[:, -1].float()
        if penalty != 1.0:
            for row, ids in zip(logits, inputs["input_ids"], strict=True):
                there = ids.unique()
                row[there] = torch.where(row[there] > 0, row[there] / penalty, row[there] * penalty)
        logits[:, [config.image_token_id, config.video_token_id]] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
        for own, each in zip(answers, token.flatten().tolist(), strict=True):
            if not own or own[-1] not in ends:
                own.append(each)
        for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros_like(token) + value], dim=1)
    return answers


def test_answers_are_the_likeliest_tokens(module: SFTModule, batch: dict[str, Any]) -> None:
    model, tokenizer = module.model, module.processor.tokenizer
    prompt = prompt_of(batch, batch["role_ids"], model, tokenizer.pad_token_id)
    # So that one of the answers ends before the others.
    ends = [*end_ids(model, module.processor), likeliest(model, prompt, [])[0][4]]
    model.generation_config.eos_token_id = ends
    expected = likeliest(model, prompt, ends)
    texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
    options: dict[str, Any] = {"processor": module.processor, "max_new_tokens": LENGTH, "columns": batch["columns"]}
    rows = answer(model, prompt, UNSTEERED, **options)
    assert [row["completion"] for row in rows] == texts
    assert [row["num_tokens"] for row in rows] == [len(each) for each in expected]
    assert [row["finished"] for row in rows] == [each[-1] in ends for each in expected]
    assert rows[0]["finished"]
    assert module.generate(batch) == texts
    # And what is asked for here is what happens.
    penalised = answer(model, prompt, UNSTEERED, **options, repetition_penalty=1.5)
    expected = likeliest(model, prompt, ends, penalty=1.5)
    assert [row["completion"] for row in penalised] == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert penalised != rows
