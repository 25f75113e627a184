"""BenchmarkCallback in somebody else's LightningModule, and through train.py."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from PIL import Image

from avar_lightning import cli, interventions
from avar_lightning.attention import Intervention
from avar_lightning.benchmarks import registry
from avar_lightning.benchmarks.mmstar import MMSTAR
from avar_lightning.callbacks import BenchmarkCallback, InterventionCallback
from avar_lightning.data import ShardDataModule
from avar_lightning.data.sample import Sample
from avar_lightning.data.writer import write_shards
from avar_lightning.evaluation import intervals, judge, results
from avar_lightning.interventions import UNSTEERED, Setting, answer, prompt_of
from tests.callbacks.test_intervention_callback import Foreign
from tests.evaluation.samples import FIGURES, LETTERS, write_benchmark
from tests.synthesis.server import ScriptedServer

ROOT = Path(__file__).parents[2]
WRITTEN = ("samples.jsonl", "results.json", "results.csv", "results.md")


def patch_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(intervals, "NUM_RESAMPLES_OF_GROUPS", 50)  # their ends are tested elsewhere
    for benchmark in (LETTERS, FIGURES):
        patch.setitem(registry.BENCHMARKS, benchmark.name, benchmark)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_in(monkeypatch)
    # A picture takes longer than these answers; one is drawn in `whole`.
    monkeypatch.setattr(results, "plot_benchmarks", lambda *_, **__: SimpleNamespace(savefig=lambda *_, **__: None))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shards")
    return {name: write_benchmark(folder / name, name, 5) for name in ("letters", "figures")}


def data(*shards: str, **options: Any) -> ShardDataModule:
    return ShardDataModule(test=list(shards), val=list(shards), batch_size=2, num_workers=0, **options)


class Asked(Foreign):
    """Does nothing of its own in a test."""

    def test_step(self, batch: dict[str, Any], index: int) -> None:
        pass

    validation_step = test_step


def run(
    folder: Path, shards: list[str], *others: L.Callback, stage: str = "test", module: Any = None, **options: Any
) -> dict[str, float]:
    """Metrics of one run."""
    callback = BenchmarkCallback(output=str(folder), **{"max_new_tokens": 3} | options)
    trainer = L.Trainer(
        default_root_dir=folder / "logs",
        callbacks=[callback, *others],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    getattr(trainer, stage)(module or Asked(), datamodule=data(*shards), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_order(folder: Path) -> dict[str, Any]:
    """What a run wrote, whoever answered in which order."""
    answers = [line for path in folder.glob("answers_*.jsonl") for line in path.read_text().splitlines()]
    return {name: (folder / name).read_text() for name in WRITTEN} | {"answers": sorted(answers)}


@pytest.fixture(scope="module")
def whole(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run on both benchmarks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch_in(patch)
        return folder, run(folder, list(shards.values()))


def test_answers_are_those_of_the_model(whole: tuple[Path, dict[str, float]], shards: dict[str, str]) -> None:
    folder, metrics = whole
    module = Foreign()
    expected = []
    for batch in data(*shards.values()).test_dataloader():
        made = answer(
            module.net,
            prompt_of(batch, batch["role_ids"], module.net, 0),
            UNSTEERED,
            processor=module.processor,
            max_new_tokens=3,
            columns=batch["columns"],
            reward=lambda completions, **_: [0.0] * len(completions),
        )
        expected += [(own, row) for own, row in zip(batch["columns"], made, strict=True)]
    rows = {row["id"]: row for row in lines(folder / "samples.jsonl")}
    assert len(rows) == len(expected) == 10
    right: dict[str, list[int]] = {"letters": [], "figures": []}
    for own, made in expected:
        row = rows[own["id"]]
        assert row["response"] == made["completion"]
        assert row["vas"] == made["vas"]
        assert row["vas_response"] == pytest.approx(made["vas_response"], nan_ok=True)
        assert f"Which letter is number {own['item']}?" in row["prompt"]
        assert "<|image_pad|>" not in row["prompt"]
        first = made["completion"].strip()[:1]
        assert row["extracted"] == (first or None)
        assert row["extracted_by"] == ("rules" if first else "nobody")
        assert row["correct"] == int(first == own["answer"])
        assert row["columns"] == own
        assert (row["finished"], row["num_tokens"]) == (made["finished"], made["num_tokens"])
        assert row["thinking"] is False
        right[own["benchmark"]].append(row["correct"])
    assert metrics["test/letters/accuracy"] == pytest.approx(sum(right["letters"]) / 5)
    vas = [rows[f"letters-{index}"]["vas"] for index in range(5)]
    assert metrics["test/letters/vas"] == pytest.approx(sum(vas) / 5)
    pairs = [right["figures"][:2], right["figures"][2:4], right["figures"][4:]]
    assert metrics["test/figures/figures"] == pytest.approx(sum(all(pair) for pair in pairs) / 3)


def test_results_are_written(whole: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = whole
    report = json.loads((folder / "results.json").read_text())
    result = report["benchmarks"]["figures"]
    assert result["metrics"]["figures"]["num_units"] == 3
    assert result["num_samples"] == 5
    assert sum(result["extracted_by"].values()) == 5
    assert {name: part["num_samples"] for name, part in result["categories"]["colour"].items()} == {"red": 3, "blue": 2}
    assert {name: part["num_samples"] for name, part in result["categories"]["skills"].items()} == {
        "look": 5,
        "count": 2,
    }
    with (folder / "results.csv").open() as file:
        table = {(row["benchmark"], row["category"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(table["letters", "", "vas"]["value"]) == pytest.approx(metrics["test/letters/vas"])
    assert float(table["letters", "red", "accuracy"]["low"]) <= float(table["letters", "red", "accuracy"]["high"])
    text = (folder / "results.md").read_text()
    assert "| AVAR-Thinker | 74.7 | 37.4 | 50.4 | 63.8 | 42.9 | 64.1 | 59.5 | 56.1 | 18.9 |" in text
    assert "Letters by colour" in text
    assert min(Image.open(folder / "results.png").size) > 200


def test_a_stopped_run_goes_on(
    whole: tuple[Path, dict[str, float]], shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = interventions.answer

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == 2:
            raise RuntimeError("the machine is gone")
        calls.append(len(kwargs["columns"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(interventions, "answer", stopping)
    with pytest.raises(RuntimeError, match="machine"):
        run(tmp_path, list(shards.values()))
    file = tmp_path / "answers_0.jsonl"
    assert len(file.read_text().splitlines()) == 4
    half = file.read_text().splitlines(keepends=True)
    file.write_text("".join(half[:3]) + half[3][:40])  # as a killed process leaves it
    calls.clear()
    monkeypatch.setattr(interventions, "answer", lambda *a, **k: calls.append(len(k["columns"])) or real(*a, **k))
    metrics = run(tmp_path, list(shards.values()))
    assert calls == [2, 2, 2, 2]  # of five batches the first was there
    assert without_order(tmp_path) == without_order(whole[0])
    assert file.read_text() == (whole[0] / "answers_0.jsonl").read_text()
    assert metrics == whole[1]
    calls.clear()
    assert run(tmp_path, list(shards.values()), stage="validate").keys() == {
        n.replace("test/", "val/") for n in metrics
    }
    assert not calls


@pytest.mark.slow
def test_benchmarks_may_come_one_after_the_other(
    whole: tuple[Path, dict[str, float]], shards: dict[str, str], tmp_path: Path
) -> None:
    run(tmp_path, [shards["letters"]])
    assert run(tmp_path, [shards["figures"]]).keys() == whole[1].keys()
    results = [json.loads((folder / "results.json").read_text())["benchmarks"] for folder in (tmp_path, whole[0])]
    assert results[0].keys() == results[1].keys() == {"letters", "figures"}


@pytest.mark.slow
def test_rules_of_today_judge_answers_of_yesterday(
    shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, [shards["letters"]])
    monkeypatch.setitem(registry.BENCHMARKS, "letters", replace(LETTERS, score=lambda *_: True))
    read = sum(row["extracted"] is not None for row in lines(tmp_path / "samples.jsonl"))
    assert run(tmp_path, [shards["letters"]])["test/letters/accuracy"] == pytest.approx(read / 5)
    assert read


@pytest.mark.slow
def test_what_differs_is_named(shards: dict[str, str], tmp_path: Path) -> None:
    run(tmp_path, [shards["letters"]])
    other = Asked()
    with torch.no_grad():
        next(other.net.parameters()).view(-1)[7] += 1e-3
    for options, says in (
        ({"module": other}, r"its weights '\w+', expected '\w+'\); give another output, or set overwrite: true"),
        ({"max_new_tokens": 4}, "its max_new_tokens 3, expected 4"),
        ({"repetition_penalty": 1.05}, "its repetition_penalty 1.0, expected 1.05"),
        ({"image": 0.5, "mode": "mass"}, "its steering None, expected {'image': 0.5"),
    ):
        with pytest.raises(ValueError, match=says):
            run(tmp_path, [shards["letters"]], **options)
    run(tmp_path, [shards["letters"]], module=other, overwrite=True)
    assert len(lines(tmp_path / "answers_0.jsonl")) == 5


def test_shards_that_were_mended(tmp_path: Path) -> None:
    """Right answers are those of today; other pictures of the same size are another prompt."""
    shards, out = tmp_path / "letters", tmp_path / "out"
    pictures = [Image.effect_noise((56, 56), 90).convert("RGB") for _ in range(2)]

    def write(answer: str) -> str:
        def sample(index: int) -> Sample:
            asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Letter {index}?"}]}
            return Sample([asked], [pictures[index]], answer=answer, id=str(index), columns={"benchmark": "letters"})

        write_shards(map(sample, range(2)), shards, overwrite=True)
        return str(shards)

    run(out, [write("?")])
    before = lines(out / "samples.jsonl")
    right = before[0]["extracted"]
    assert [row["correct"] for row in before] == [0, 0]
    assert json.loads((out / "evaluation.json").read_text())["repetition_penalty"] == 1.0
    metrics = run(out, [write(right)])
    after = lines(out / "samples.jsonl")
    assert [row["response"] for row in after] == [row["response"] for row in before]
    assert [row["columns"]["answer"] for row in after] == [right] * 2
    assert metrics["test/letters/accuracy"] == sum(row["extracted"] == right for row in before) / 2 > 0
    pictures[1].putpixel((5, 5), (1, 2, 3))
    with pytest.raises(ValueError, match="an answer to another prompt for sample '1' of letters"):
        run(out, [write(right)])


@pytest.mark.slow
def test_steering(whole: tuple[Path, dict[str, float]], shards: dict[str, str], tmp_path: Path) -> None:
    run(tmp_path, [shards["letters"]], image=3.0, system=0.9, mode="mass")
    module, expected = Foreign(), []
    for batch in data(shards["letters"]).test_dataloader():
        prompt = prompt_of(batch, batch["role_ids"], module.net, 0)
        setting = Setting("steered", Intervention(3.0, 0.9, "mass"))
        made = answer(
            module.net, prompt, setting, processor=module.processor, max_new_tokens=3, columns=batch["columns"]
        )
        expected += [row["vas"] for row in made]
    assert [row["vas"] for row in lines(tmp_path / "samples.jsonl")] == expected
    assert whole[1]["test/letters/vas"] < sum(expected) / 5


@pytest.mark.slow
def test_beside_interventions(shards: dict[str, str], tmp_path: Path) -> None:
    """Both answer; the reward that knows benchmarks scores as the rules do."""
    steering = InterventionCallback(image=3.0, mode="mass", max_new_tokens=3, reward=registry.benchmark_reward)
    metrics = run(tmp_path, [shards["letters"]], steering)
    assert metrics["test/unsteered/accuracy"] == pytest.approx(metrics["test/letters/accuracy"])
    assert metrics["test/unsteered/vas"] == pytest.approx(metrics["test/letters/vas"])
    [report] = (tmp_path / "logs").rglob("interventions/*.json")
    samples = json.loads(report.read_text())["settings"]["unsteered"]["samples"]
    rows = lines(tmp_path / "samples.jsonl")
    assert [row["completion"] for row in samples] == [row["response"] for row in rows]
    assert [row["accuracy"] for row in samples] == [row["correct"] for row in rows]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"max_new_tokens": 0}, "max_new_tokens=0"), ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
     ({"queries": ["image"]}, "expected one or both of"),
     ({"image": 1.0, "mode": "post"}, "mode is 'post'")],
)  # fmt: skip
def test_arguments_without_meaning(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BenchmarkCallback(**options)


def test_samples_of_no_benchmark(make_data: Any, tmp_path: Path) -> None:
    trainer = L.Trainer(
        callbacks=[BenchmarkCallback(output=str(tmp_path), max_new_tokens=1)], logger=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="benchmark is None; expected one of"):
        trainer.test(Asked(), make_data(val_batch_size=5).val_dataloader(), verbose=False)


@pytest.mark.slow
def test_through_train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its recipe says, with a judge and an intervention beside it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge, "MAX_WAIT", 0.02)
    monkeypatch.chdir(tmp_path)
    server = ScriptedServer()
    server.texts |= {("reason", item): "(B)" for item in range(6)}
    write_benchmark(tmp_path / "shards" / "mmstar", "mmstar", 6)
    write_benchmark(tmp_path / "shards" / "letters", "letters", 2)
    unread = replace(MMSTAR, extract=lambda *_: None, extraction_prompt=lambda _, columns: f"Item {columns['item']}")
    monkeypatch.setitem(registry.BENCHMARKS, "mmstar", unread)
    overlay = {
        "trainer": {
            "callbacks+": [
                {
                    "class_path": "avar_lightning.callbacks.InterventionCallback",
                    "init_args": {"max_new_tokens": 4, "reward": "avar_lightning.benchmarks.benchmark_reward"},
                }
            ]
        }
    }
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    command = [
        "test",
        "--config",
        str(ROOT / "configs/eval.yaml"),
        "--data.init_args.test",
        "shards/{mmstar,letters}/*.tar",
    ]
    command += ["--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu"]
    options = {"output": "out", "max_new_tokens": "4", "judge.model": "reason", "judge.base_url": server.url}
    for name, value in options.items():
        command += [f"--trainer.callbacks.init_args.{name}", value]
    command += ["--config", "overlay.yaml"]
    try:
        assert cli.main(command) == 0
        rows = [row for row in lines(tmp_path / "out" / "samples.jsonl") if row["benchmark"] == "mmstar"]
        assert [(row["id"], row["extracted"], row["extracted_by"]) for row in rows] == [
            (f"mmstar-{item}", "B", "judge") for item in range(6)
        ]
        assert [row["correct"] for row in rows] == [0, 1, 0] * 2
        assert len(server.requests) == 6
        assert "AVAR-Thinker" in (tmp_path / "out" / "results.md").read_text()
    finally:
        server.stop()
