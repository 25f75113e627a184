"""`avar sweep`: answers that add up over calls, results made of them, and errors in one sentence."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import avar_lightning.sweep
from avar_lightning.commands import main
from avar_lightning.interventions import UNSTEERED, paired_difference
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import load_processor

QUICK = ["--max-new-tokens", "2", "--batch-size", "5"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = load_model(VLMConfig("demo", from_scratch=True))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / f"seed_{seed}")
        load_processor("demo").save_pretrained(folder / f"seed_{seed}")
    return folder


@pytest.fixture
def shards(make_data: Any) -> str:
    return str(make_data().val_folder)


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return {row["setting"]: row for row in csv.DictReader(file)}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().rstrip("\n").split("\n")]


def test_a_sweep_writes_answers_table_and_pictures(models: Path, shards: str, tmp_path: Path, capsys: Any) -> None:
    grid = ["--image", "0,0.5", "--system", "0,0.5", "--mode", "logit,mass"]
    assert main(["sweep", str(models / "seed_0"), shards, str(tmp_path), *grid, *QUICK]) == 0
    results = table(tmp_path)
    strengths = ["image=0 system=0.5", "image=0.5 system=0", "image=0.5 system=0.5"]
    assert list(results) == [UNSTEERED.name, *(f"{mode} {both}" for mode in ("logit", "mass") for both in strengths)]
    rows = lines(tmp_path)
    assert len(rows) == 7 * 10
    by = {(row["setting"], row["sample"]): row for row in rows}
    for setting, result in results.items():
        before = [by[UNSTEERED.name, sample]["vas"] for sample in range(10)]
        after = [by[setting, sample]["vas"] for sample in range(10)]
        assert float(result["vas"]) == pytest.approx(sum(after) / 10)
        difference = paired_difference(before, after)
        assert float(result["vas_difference"]) == pytest.approx(difference.mean)
        assert float(result["vas_low"]) == pytest.approx(difference.low)
        assert result["vas_significant"] == str(difference.significant)
    for name in ("accuracy", "vas_ratio_of_means", "vas_ratio_of_means_response", "differences"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 200
    assert (tmp_path / "results.md").read_text().strip() in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_a_larger_grid_adds(
    models: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = str(models / "seed_0")
    small = ["sweep", model, shards, str(tmp_path), "--image", "0.5", "--system", "0", *QUICK]
    calls: list[str] = []
    real = avar_lightning.sweep.answer

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args[2].name)
        rows = real(*args, **kwargs)
        return [row | {"completion": f"{row['completion']}\u2028"} for row in rows]  # a line separator, but no line end

    monkeypatch.setattr(avar_lightning.sweep, "answer", stopping)
    assert main(small) == 130
    assert "call the same command again" in capsys.readouterr().err
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"model": "half a li')  # as a crash leaves it
    calls.clear()
    monkeypatch.setattr(avar_lightning.sweep, "answer", lambda *a, **k: calls.append(a[2].name) or real(*a, **k))
    assert main(small) == 0
    assert calls == ["logit image=0.5 system=0"]  # the second batch of it was missing, and nothing else
    assert len(lines(tmp_path)) == 20
    calls.clear()
    assert main([*small[:-2], *QUICK[-2:], "--image", "0.5,1"]) == 0
    assert calls == ["logit image=1 system=0"] * 2
    whole = tmp_path / "whole"
    assert main([*small[:3], str(whole), *small[4:], "--image", "0.5,1"]) == 0
    assert table(whole) == table(tmp_path)


def test_several_models_are_pooled(models: Path, shards: str, tmp_path: Path) -> None:
    strength = ["--image", "1", "--system", "0", "--mode", "mass", "--max-samples", "5", "--max-new-tokens", "2"]
    assert main(["sweep", str(models / "seed_*"), shards, str(tmp_path), *strength]) == 0
    rows, result = lines(tmp_path), table(tmp_path)["mass image=1 system=0"]
    assert len(rows) == 2 * 2 * 5
    means = [
        sum(row["vas"] for row in rows if row["model"] == model and row["setting"] != UNSTEERED.name) / 5
        for model in sorted({row["model"] for row in rows})
    ]
    assert float(result["vas"]) == pytest.approx(sum(means) / 2)
    assert float(result["vas_sd_of_models"]) == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert result["vas_num_pairs"] == "10"


def test_a_checkpoint_is_swept(shards: str, tmp_path: Path, make_data: Any) -> None:
    import lightning as L

    from avar_lightning import SFTModule

    module = SFTModule(VLMConfig("demo", from_scratch=True))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    arguments = ["sweep", str(tmp_path / "one.ckpt"), shards, str(tmp_path / "out"), "--image", "1", *QUICK]
    assert main([*arguments, "--system", "0", "--queries", "last", "--layers", "0.5-1.0"]) == 0
    assert len(lines(tmp_path / "out")) == 20


def test_another_sweep_s_answers_are_not_mixed_in(models: Path, shards: str, tmp_path: Path, capsys: Any) -> None:
    arguments = ["sweep", str(models / "seed_0"), shards, str(tmp_path), "--image", "1", "--system", "0", *QUICK]
    assert main(arguments) == 0
    assert main([*arguments, "--queries", "last"]) == 1
    assert "holds a sweep with other queries (None), expected 'last'; give another folder" in capsys.readouterr().err
    assert len(lines(tmp_path)) == 20
    assert main([*arguments, "--queries", "last", "--overwrite"]) == 0
    assert len(lines(tmp_path)) == 20


def test_changed_shards_are_another_sweep(models: Path, tmp_path: Path, capsys: Any, make_data: Any) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(make_data().val_folder, shards)
    arguments = ["sweep", str(models / "seed_0"), str(shards), str(tmp_path / "out"), "--image", "1", "--system", "0"]
    assert main([*arguments, *QUICK]) == 0
    for tar in shards.glob("*.tar"):
        os.utime(tar, (1, 1))
    assert main([*arguments, *QUICK]) == 1
    assert "holds a sweep with other data" in capsys.readouterr().err


def test_a_mistake_deletes_nothing(models: Path, shards: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", str(models / "seed_0"), shards, str(out), "--image", "1", "--system", "0", *QUICK]
    assert main([*arguments, "--layers", "9"]) == 1
    assert not out.exists()
    assert main(arguments) == 0
    mistyped = ["sweep", str(models / "seed_9"), *arguments[2:], "--overwrite"]
    assert main(mistyped) == 1
    assert len(lines(out)) == 20


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({0: "/no/such/model"}, "No model at '/no/such/model'"),
        ({0: "/no/such/*"}, "No model matches"),
        ({0: "/no/such/one.ckpt"}, "No checkpoint at"),
        ({1: "/no/such/shards"}, "/no/such/shards"),
        ({"--mode": "post"}, "mode is 'post', expected some of logit, mass, abs"),
        ({"--layers": "9"}, "expected one or more of the decoder's layers 0 to 3"),
        ({"--system": "1.5"}, "expected 1 or less"),
        ({"--image": "0", "--system": "0"}, "steers nothing"),
        ({"--attn-implementation": "flash_attention_9"}, "'flash_attention_9' cannot be used with"),
        ({"--image": "0.5,0.5"}, "is in the grid more than once"),
        ({"--batch-size": "0"}, "batch_size is 0, expected at least 1"),
    ],
)
def test_bad_input_gets_one_sentence(
    models: Path, shards: str, tmp_path: Path, capsys: Any, changes: dict[Any, str], says: str
) -> None:
    places = [str(models / "seed_0"), shards, str(tmp_path / "out")]
    named = {"--image": "0.5", "--max-new-tokens": "1"}
    for key, value in changes.items():
        if isinstance(key, int):
            places[key] = value
        else:
            named[key] = value
    assert main(["sweep", *places, *(word for pair in named.items() for word in pair)]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["sweep"], ["sweep", "a", "b", "c", "--image", "much"], ["swoop"], []])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
