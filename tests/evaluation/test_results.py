"""Tables, published rows, and what a test of prompts alone computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from avar_lightning import SFTModule
from avar_lightning.benchmarks import BENCHMARKS, registry
from avar_lightning.benchmarks.benchmark import mean_accuracy, own_id
from avar_lightning.data import ShardDataModule
from avar_lightning.evaluation import Interval, bootstrap_mean, evaluate, results, write_results
from avar_lightning.evaluation.identity import weights_checksum
from avar_lightning.evaluation.published import columns_of, published
from avar_lightning.model import VLMConfig
from tests.evaluation.samples import write_benchmark


@pytest.mark.parametrize("row", published().rows, ids=lambda row: row["model"])
def test_published_averages_are_those_of_their_figures(row: dict[str, Any]) -> None:
    """A slip of the pen shows here; what does not fit is said in a note."""
    assert row["source"]
    assert published().sources[row["source"]]["address"].startswith("https://")
    assert (row["vas"] is None) == (row["vas_source"] is None)
    if row["accuracy"]:
        assert row["accuracy"].keys() == published().columns.keys()
        mean = sum(row["accuracy"].values()) / 7
        assert (abs(mean - row["average"]) <= 0.051) == ("note" not in row)


def figure(values: list[float], name: str = "") -> Interval:
    return bootstrap_mean(values, [f"{name}{index}" for index in range(len(values))])


def test_columns_of_the_paper() -> None:
    assert {name for of in published().parts.values() for name in of} == set(BENCHMARKS)
    one = figure([0.0, 1.0])
    assert columns_of({"mmmu_pro": one, "mmstar": one}, []) == {"mmstar": one}  # the vision part is missing
    rng = np.random.default_rng(0)
    right = {name: (rng.random(400) < 0.5).astype(int).tolist() for name in BENCHMARKS}
    right["mmmu_pro_vision"] = right["mmmu_pro"]  # the same questions, answered alike
    rows = [
        {"benchmark": name, "id": str(index), "correct": each}
        for name, values in right.items()
        for index, each in enumerate(values)
    ]
    alone = {name: figure(values) for name, values in right.items()}
    found = columns_of(alone, rows)
    # Two parts that always agree say no more than one of them.
    assert found["mmmu_pro"].value == pytest.approx(np.mean(right["mmmu_pro"]))
    assert found["mmmu_pro"].num_units == 400
    assert (found["mmmu_pro"].low, found["mmmu_pro"].high) == pytest.approx(normal(right["mmmu_pro"]), abs=0.006)
    # Seven independent ones: variances add, over 49.
    columns = [right[name] for name in right if name != "mmmu_pro_vision"]
    half = 1.96 * np.sqrt(sum(np.var(values) / 400 for values in columns)) / 7
    mean = np.mean(columns)
    assert found["average"].value == pytest.approx(mean)
    assert (found["average"].low, found["average"].high) == pytest.approx((mean - half, mean + half), abs=0.003)


def normal(values: list[int]) -> tuple[float, float]:
    """The interval by the normal approximation."""
    half = 1.96 * np.std(values) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def mmstar(index: int, correct: int, vas: float, name: str = "mmstar", **more: Any) -> dict[str, Any]:
    columns = {"benchmark": name, "id": str(index), "category": ["math", "a|b"][index % 2], "l2_category": None}
    scores = dict.fromkeys(("vas", "vas_ratio_of_means", "vas_response", "vas_ratio_of_means_response"), vas)
    verdict = {"response": "B", "extracted": "B", "extracted_by": "rules", "correct": correct, "finished": True}
    return {"benchmark": name, "id": str(index), "prompt": "?", "columns": columns} | verdict | scores | more


def test_a_model_beside_the_published_ones(tmp_path: Path) -> None:
    rows = [mmstar(index, int(index < 3), float("nan") if index == 3 else 2.0) for index in range(4)]
    rows[3] |= {"extracted_by": "nobody", "extracted": None, "finished": False}
    found = evaluate(rows)
    text = write_results(tmp_path, found, rows, about={"model": "/home/somebody/runs/mine"})
    here = next(line for line in text.splitlines() if "(here)" in line)
    assert here.startswith(
        "| **runs/mine** (here) | – | – | – | – | – | 75.0 (25.0 to 100.0) *, 1 unread | – | – | – |"
    )
    assert "| MMStar | 4 of 1500 | accuracy | 75.0 (25.0 to 100.0) | 2.0 (2.0 to 2.0)" in text
    assert "| 3, 0, 1 | 1 (25.0 %) |" in text
    assert "Unread: neither rules nor a judge" in text
    assert found["mmstar"]["vas"]["vas"].num_samples == 3
    assert found["mmstar"]["categories"]["l2_category"] == {}
    written = (tmp_path / "results.md").read_text()
    assert r"| a\|b | 2 | 50.0" in written
    for source in published().sources.values():
        assert source["address"] in written
    assert "second-hand" in written
    assert "NaN" not in (tmp_path / "results.json").read_text() + (tmp_path / "samples.jsonl").read_text()


def test_what_is_partial_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the average and in VAS as well, and not where all questions were answered."""
    monkeypatch.setattr(results, "plot_benchmarks", lambda *_, **__: SimpleNamespace(savefig=lambda *_, **__: None))
    for name, benchmark in BENCHMARKS.items():
        small = replace(benchmark, questions=2, categories=(), unit=own_id, metrics=mean_accuracy)
        monkeypatch.setitem(registry.BENCHMARKS, name, small)
    rows = [mmstar(index, index % 2, 2.0, name) for name in BENCHMARKS for index in range(2)]
    about = {"model": "mine"}

    def here(rows: list[dict[str, Any]]) -> list[str]:
        text = write_results(tmp_path, evaluate(rows), rows, about=about)
        return [cell.strip() for cell in next(line for line in text.splitlines() if "(here)" in line).split("|")]

    assert here(rows)[2:10] == ["50.0 (0.0 to 100.0)"] * 7 + [here(rows)[9]]
    assert here(rows)[9].startswith("50.0 (")
    assert here(rows)[10] == "2.0 (2.0 to 2.0)"
    assert not any("*" in cell for cell in here(rows)[2:])
    marked = [
        "*" in cell for cell in here([row for row in rows if (row["benchmark"], row["id"]) != ("mathvista", "0")])
    ]
    assert marked[2:11] == [True] + [False] * 6 + [True, True]
    marked = ["*" in cell for cell in here([row for row in rows if (row["benchmark"], row["id"]) != ("mmmu_pro", "0")])]
    assert marked[2:11] == [False] * 4 + [True] + [False] * 2 + [True, False]


def test_weights_tell_one_training_from_another() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    before = weights_checksum(model)
    assert weights_checksum(model) == before
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nextafter(model[0].weight[1, 2], torch.tensor(9.0))
    assert weights_checksum(model) != before
    changed = weights_checksum(model)
    model[0], model[1] = model[1], model[0]
    assert weights_checksum(model) not in (before, changed)
    assert weights_checksum(model.bfloat16()) != weights_checksum(model.float())


@pytest.mark.parametrize(("stage", "forwards"), [("test", 0), ("validate", 3)])
def test_prompts_alone_need_no_forward_in_a_test(
    stage: str, forwards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = SFTModule.lm_loss
    monkeypatch.setattr(SFTModule, "lm_loss", lambda self, batch: calls.append(1) or real(self, batch))
    shards = write_benchmark(tmp_path / "shards", "letters", 5)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    data = ShardDataModule(test=shards, val=shards, batch_size=2, num_workers=0)
    getattr(trainer, stage)(SFTModule(VLMConfig("demo")), datamodule=data, verbose=False)
    assert len(calls) == forwards
    assert ("test/loss" in trainer.callback_metrics) is False
