"""Measure models on the demo world's test split, which nothing is chosen by: answers, attention, need of the picture.

    python benchmarks/reproduction/testing.py MODEL…

writes `test_N.json` and `answers_N.jsonl` beside each model, unless they are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avar_lightning.attention import observe_attention
from avar_lightning.callbacks.measurement import KEYS, QUERIES, Measurement
from avar_lightning.data import DemoDataModule
from avar_lightning.data.demo import TASKS
from avar_lightning.files import write_json, write_jsonl
from avar_lightning.interventions import UNSTEERED, answer, columns_of, mean, prompt_of
from avar_lightning.model import load_model
from avar_lightning.module import NOT_MODEL_INPUTS
from avar_lightning.processing import load_processor, padding_id

NUM_SAMPLES, BATCH_SIZE, MAX_NEW_TOKENS = 300, 100, 144


def result_path(model: Path) -> Path:
    """Where the measurement of a model is: beside its folder in a run."""
    return model.parent / f"test_{NUM_SAMPLES}.json"


def held_out() -> DemoDataModule:
    """The split, with references that describe the picture, whatever a model was trained on."""
    data = DemoDataModule(style="anchored", num_test=NUM_SAMPLES, val_batch_size=BATCH_SIZE, num_workers=0)
    data.prepare_data()
    return data


@torch.no_grad()
def measure(folder: Path, data: DemoDataModule) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that is said of one model: a summary, and a row a sample."""
    processor = load_processor(folder)
    model: Any = load_model(str(folder)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    references, validation = Measurement(tuple(QUERIES)), Measurement(tuple(QUERIES))
    rows: list[dict[str, Any]] = []
    losses: list[float] = []
    for batch in data.val_dataloader():
        _observed_nll(model, _moved(batch, model.device), validation)
    for batch in data.test_dataloader():
        batch = _moved(batch, model.device)
        role_ids = batch["role_ids"]
        own = _observed_nll(model, batch, references)
        other = _nll(model, batch, _pictures_of_others(batch))
        prompt = prompt_of(batch, role_ids, model, padding_id(processor))
        columns = columns_of(batch, role_ids, processor)
        answers = answer(model, prompt, UNSTEERED, processor=processor, max_new_tokens=MAX_NEW_TOKENS, columns=columns)
        losses += own.tolist()
        gains = (other - own).tolist()
        rows += [
            {name: column[name] for name in ("task", "note", "note_right", "answer")} | row | {"picture_gain": gain}
            for column, row, gain in zip(columns, answers, gains, strict=True)
        ]
    summary = {
        "num_samples": len(rows),
        "accuracy": mean(row["accuracy"] for row in rows),
        "accuracy_note_right": mean(row["accuracy"] for row in rows if row["note_right"]),
        "accuracy_note_wrong": mean(row["accuracy"] for row in rows if not row["note_right"]),
        "follows_wrong_note": mean(row["note"] in _last(row) for row in rows if not row["note_right"]),
        "accuracy_by_task": {task: mean(row["accuracy"] for row in rows if row["task"] == task) for task in TASKS},
        "answers": {name: mean(row[name] for row in rows) for name in rows[0] if name.startswith("vas")},
        "describes": mean("I look at the picture" in row["completion"] for row in rows),
        "reference_loss": statistics.fmean(losses),
        "picture_gain": mean(row["picture_gain"] for row in rows),
        "references": {name: references.report(name) for name in QUERIES},
        "validation_map": validation.report("response")["map"],
    }
    return summary, rows


def _last(row: dict[str, Any]) -> str:
    """What a completion answers, be it well-formed or not."""
    return str(row["completion"]).rpartition("<answer>")[2]


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _observed_nll(model: Any, batch: dict[str, Any], measurement: Measurement) -> Tensor:
    role_ids = batch["role_ids"]
    with observe_attention(model, role_ids, queries=list(QUERIES.values()), keys=KEYS) as record:
        nll = _nll(model, batch, batch["pixel_values"])
    ids = [column["id"] for column in batch["columns"]]
    measurement.update(record.stacked(), role_ids, ids, layers=record.layers)
    return nll


def _nll(model: Any, batch: dict[str, Any], pixel_values: Tensor) -> Tensor:
    """Mean negative log-likelihood of each reference response, in nats a token (B,)."""
    inputs = {name: value for name, value in batch.items() if name not in (*NOT_MODEL_INPUTS, "labels")}
    logits = model(**inputs | {"pixel_values": pixel_values}, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nll.sum(1) / (labels != -100).sum(1)


def _pictures_of_others(batch: dict[str, Any]) -> Tensor:
    """The same pictures, each with the next question of the same kind; all have one size, and kinds take turns."""
    size = len(batch["input_ids"])
    pictures = batch["pixel_values"].view(size, -1, batch["pixel_values"].shape[-1])
    return pictures.roll(len(TASKS), dims=0).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="Hugging Face folders")
    models = [model for model in parser.parse_args().models if not result_path(model).is_file()]
    data = held_out()
    for model in models:
        summary, rows = measure(model, data)
        write_jsonl(result_path(model).with_name(f"answers_{NUM_SAMPLES}.jsonl"), rows)
        write_json(result_path(model), summary)
        print(json.dumps({"model": str(model), "accuracy": summary["accuracy"]}), flush=True)


if __name__ == "__main__":
    main()
