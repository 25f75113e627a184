"""Tables, published rows, and what a test of prompts alone computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from avar_lightning import SFTModule
from avar_lightning.benchmarks import BENCHMARKS
from avar_lightning.data import ShardDataModule
from avar_lightning.evaluation import evaluate, write_results
from avar_lightning.evaluation.identity import weights_checksum
from avar_lightning.evaluation.published import columns_of, published
from avar_lightning.model import VLMConfig
from tests.evaluation.samples import write_benchmark


@pytest.mark.parametrize("row", published().rows, ids=lambda row: row["model"])
def test_published_averages_are_those_of_their_figures(row: dict[str, Any]) -> None:
    """A slip of the pen shows here; what does not fit is said in a note."""
    assert row["source"]
    if row["accuracy"]:
        assert row["accuracy"].keys() == published().columns.keys()
        mean = sum(row["accuracy"].values()) / 7
        assert (abs(mean - row["average"]) <= 0.051) == ("note" not in row)


def test_columns_of_the_paper() -> None:
    assert {name for of in published().parts.values() for name in of} == set(BENCHMARKS)
    assert columns_of({"mmmu_pro": 0.4, "mmstar": 0.5}) == {"mmstar": 50.0}  # the vision part is missing
    every = dict.fromkeys(BENCHMARKS, 0.5) | {"mmmu_pro": 0.4, "mmmu_pro_vision": 0.2}
    found = columns_of(every)
    assert found["mmmu_pro"] == pytest.approx(30.0)
    assert found["average"] == pytest.approx((6 * 50 + 30) / 7)


def mmstar(index: int, correct: int, vas: float) -> dict[str, Any]:
    columns = {"benchmark": "mmstar", "id": str(index), "category": ["math", "a|b"][index % 2], "l2_category": None}
    scores = dict.fromkeys(("vas", "vas_ratio_of_means", "vas_response", "vas_ratio_of_means_response"), vas)
    verdict = {"response": "B", "extracted": "B", "extracted_by": "rules", "correct": correct}
    return {"benchmark": "mmstar", "id": str(index), "prompt": "?", "columns": columns} | verdict | scores


def test_a_model_beside_the_published_ones(tmp_path: Path) -> None:
    rows = [mmstar(index, int(index < 3), float("nan") if index == 3 else 2.0) for index in range(4)]
    results = evaluate(rows)
    text = write_results(tmp_path, results, rows, about={"model": "/home/somebody/runs/mine"})
    here = next(line for line in text.splitlines() if "(here)" in line)
    assert here.startswith("| **runs/mine** (here) | – | – | – | – | – | 75.0 (25.0 to 100.0) * | – | – | – |")
    assert "| MMStar | 4 of 1500 | accuracy | 75.0 (25.0 to 100.0) | 2.0 (2.0 to 2.0)" in text
    assert results["mmstar"]["vas"]["vas"].num_samples == 3
    assert results["mmstar"]["categories"]["l2_category"] == {}
    written = (tmp_path / "results.md").read_text()
    assert r"| a\|b | 2 | 50.0" in written
    assert "NaN" not in (tmp_path / "results.json").read_text() + (tmp_path / "samples.jsonl").read_text()


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
