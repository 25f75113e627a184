"""Measure models on the demo world's test split, which nothing is chosen by: answers, attention, need of the picture.

    python -m benchmarks.reproduction.testing MODEL…

writes a summary and a row an answer beside each model, unless they are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avar_lightning.attention import observe_attention
from avar_lightning.callbacks.measurement import KEYS, QUERIES, Measurement
from avar_lightning.data import DemoDataModule
from avar_lightning.data.demo import TASKS, WORLD_VERSION
from avar_lightning.files import write_json, write_jsonl
from avar_lightning.interventions import UNSTEERED, answer, columns_of, mean, prompt_of
from avar_lightning.model import load_model
from avar_lightning.module import NOT_MODEL_INPUTS
from avar_lightning.processing import load_processor, padding_id
from avar_lightning.rewards import extract_answer
from avar_lightning.roles import Role

NUM_SAMPLES, BATCH_SIZE, MAX_NEW_TOKENS = 400, 200, 144
SETTINGS = {"questions": NUM_SAMPLES, "max_new_tokens": MAX_NEW_TOKENS, "world": WORLD_VERSION, "version": 1}
"""What a measurement hangs on beside the model; `version` is raised with every change of what is measured."""
DIGEST = hashlib.sha256(json.dumps(SETTINGS).encode()).hexdigest()[:8]


def result_path(model: Path) -> Path:
    """Where the summary of a model is: beside its folder in a run."""
    return model.parent / f"test_{DIGEST}.json"


def answers_path(model: Path) -> Path:
    """Where its answers are, a line each."""
    return model.parent / f"test_{DIGEST}.jsonl"


def held_out() -> DemoDataModule:
    """The split, with references that describe the picture, whatever a model was trained on."""
    return DemoDataModule(style="anchored", num_test=NUM_SAMPLES, val_batch_size=BATCH_SIZE, num_workers=0)


@torch.no_grad()
def measure(folder: Path, data: DemoDataModule) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that is said of one model: a summary, and a row a sample."""
    processor = load_processor(folder)
    model: Any = load_model(str(folder)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    references, validation = Measurement(tuple(QUERIES)), Measurement(tuple(QUERIES))
    rows: list[dict[str, Any]] = []
    losses: list[float] = []
    masses: list[float] = []
    for batch in data.val_dataloader():
        _observed_nll(model, _moved(batch, model.device), validation)
    for number, batch in enumerate(data.test_dataloader()):
        batch = _moved(batch, model.device)
        nll, system = _observed_nll(model, batch, references)
        losses += nll.tolist()
        masses.append(system)
        answers = _answers(model, batch, processor)
        if number == 0:  # half of the questions again, each with another one's picture
            others = _answers(
                model, batch | {"pixel_values": _pictures_of(batch, _others(batch["columns"]))}, processor
            )
            for row, other in zip(answers, others, strict=True):
                row["accuracy_other_picture"] = other["accuracy"]
        rows += answers
    wrong_notes = [row for row in rows if not row["note_right"]]
    swapped = [row for row in rows if row["other_answers"] and "accuracy_other_picture" in row]
    summary = {
        "settings": SETTINGS,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "versions": {package: metadata.version(package) for package in ("torch", "transformers")},
        "num_samples": len(rows),
        "accuracy": mean(row["accuracy"] for row in rows),
        "accuracy_note_right": mean(row["accuracy"] for row in rows if row["note_right"]),
        "accuracy_note_wrong": mean(row["accuracy"] for row in wrong_notes),
        "follows_wrong_note": mean(extract_answer(row["completion"]) == row["note"] for row in wrong_notes),
        "no_answer": mean(extract_answer(row["completion"]) is None for row in rows),
        "accuracy_by_task": {task: mean(row["accuracy"] for row in rows if row["task"] == task) for task in TASKS},
        "answers": {name: mean(row[name] for row in rows) for name in rows[0] if name.startswith("vas")},
        "describes": mean("I look at the picture" in row["completion"] for row in rows),
        "reference_loss": statistics.fmean(losses),
        "system_mass": statistics.fmean(masses),
        "need_of_picture": mean(row["accuracy"] - row["accuracy_other_picture"] for row in swapped),
        "num_swapped": len(swapped),
        "references": {name: references.report(name) for name in QUERIES},
        "validation_map": validation.report("response")["map"],
    }
    return summary, rows


def _answers(model: Any, batch: dict[str, Any], processor: Any) -> list[dict[str, Any]]:
    prompt = prompt_of(batch, batch["role_ids"], model, padding_id(processor))
    columns = columns_of(batch, batch["role_ids"], processor)
    found = answer(model, prompt, UNSTEERED, processor=processor, max_new_tokens=MAX_NEW_TOKENS, columns=columns)
    others = _others(columns)
    return [
        {name: column[name] for name in ("task", "note", "note_right", "answer")}
        | {"other_answers": column["answer"] != columns[other]["answer"]}
        | row
        for column, other, row in zip(columns, others, found, strict=True)
    ]


def _others(columns: list[dict[str, Any]]) -> list[int]:
    """For each sample the next one of the same kind; kinds take turns."""
    others = [(index + len(TASKS)) % len(columns) for index in range(len(columns))]
    assert all(columns[index]["task"] == columns[other]["task"] for index, other in enumerate(others))
    return others


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _observed_nll(model: Any, batch: dict[str, Any], measurement: Measurement) -> tuple[Tensor, float]:
    """Mean negative log-likelihood of each reference, in nats a token (B,), and the mean mass on the system prompt."""
    role_ids = batch["role_ids"]
    inputs = {name: value for name, value in batch.items() if name not in (*NOT_MODEL_INPUTS, "labels")}
    with observe_attention(model, role_ids, queries=list(QUERIES.values()), keys=KEYS) as record:
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    ids = [column["id"] for column in batch["columns"]]
    measurement.update(record.stacked(), role_ids, ids, layers=record.layers)
    rows = record.query_mask(Role.RESPONSE)[None, :, None, :]
    system = record.mass_of(Role.SYSTEM)
    return nll.sum(1) / (labels != -100).sum(1), float(system[rows.expand_as(system)].mean())


def _pictures_of(batch: dict[str, Any], samples: list[int]) -> Tensor:
    """The batch's pictures in the order of some samples; all have one size."""
    pixels: Tensor = batch["pixel_values"]
    return pixels.unflatten(0, (len(batch["input_ids"]), -1))[samples].flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="Hugging Face folders")
    models = [model for model in parser.parse_args().models if not result_path(model).is_file()]
    data = held_out()
    data.prepare_data()
    for model in models:
        summary, rows = measure(model, data)
        write_jsonl(answers_path(model), rows)
        write_json(result_path(model), summary)
        print(model, flush=True)


if __name__ == "__main__":
    main()
