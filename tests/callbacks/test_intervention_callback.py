"""InterventionCallback in somebody else's LightningModule."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from avar_lightning.attention import Intervention
from avar_lightning.callbacks import InterventionCallback
from avar_lightning.interventions import UNSTEERED, Setting, answer, paired_difference, prompt_of
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import load_processor
from tests.attention.families import FAMILIES

METRICS = ["accuracy", "vas", "vas_ratio_of_means", "vas_response", "vas_ratio_of_means_response"]


class Foreign(L.LightningModule):
    """Somebody else's module, which holds a VLM and its processor and knows nothing of attention."""

    def __init__(self, processor: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = load_model(VLMConfig("demo", from_scratch=True))
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
        if processor:
            self.processor = load_processor("demo")

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
        loss = self.net(**{name: batch[name] for name in names if name in batch}, labels=batch["input_ids"]).loss
        self.log("own", loss, batch_size=len(batch["input_ids"]))

    test_step = validation_step
    training_step = validation_step

    def configure_optimizers(self) -> None:
        return None


def length_reward(completions: list[str], **columns: Any) -> list[float]:
    """Any number that depends on the answer."""
    return [float(len(text) % 7) / 7 for text in completions]


@pytest.fixture
def batches(make_data: Any) -> list[dict[str, Any]]:
    return list(make_data(val_batch_size=5).val_dataloader())


def run(
    folder: Path, callback: InterventionCallback, batches: list[dict[str, Any]], stage: str = "validate", **options: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and the JSON of one run."""
    module = options.pop("module", None) or Foreign()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        default_root_dir=folder, callbacks=[callback], accelerator="cpu", **{"logger": False} | quiet | options
    )
    getattr(trainer, stage)(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    [path] = folder.rglob("interventions/*.json")
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, json.loads(path.read_text())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_one_setting(tmp_path: Path, batches: list[dict[str, Any]], stage: str) -> None:
    callback = InterventionCallback(image=3.0, system=0.9, mode="mass", max_new_tokens=4, reward=length_reward)
    metrics, report = run(tmp_path, callback, batches, stage)
    module, setting = Foreign(), Setting("mass image=3 system=0.9", Intervention(3.0, 0.9, "mass"))
    expected: dict[str, list[dict[str, Any]]] = {}
    for one in (UNSTEERED, setting):
        expected[one.name] = [
            row
            for batch in batches
            for row in answer(
                module.net,
                prompt_of(batch, batch["role_ids"], module.net, 0),
                one,
                processor=module.processor,
                max_new_tokens=4,
                columns=batch["columns"],
                reward=length_reward,
            )
        ]
    assert report["num_samples"] == 10
    assert report["settings"][setting.name]["intervention"]["mode"] == "mass"
    prefix = "val" if stage == "validate" else "test"
    for name, rows in expected.items():
        assert [row["completion"] for row in report["settings"][name]["samples"]] == [r["completion"] for r in rows]
        for metric in METRICS:
            mean = sum(row[metric] for row in rows) / len(rows)
            assert metrics[f"{prefix}/{name.replace(' ', '_')}/{metric}"] == pytest.approx(mean, rel=1e-4)
    steered = f"{prefix}/mass_image=3_system=0.9"
    for metric in METRICS:
        pairs = ([row[metric] for row in expected[name]] for name in expected)
        difference = paired_difference(*pairs)
        for end, value in (("difference", difference.mean), ("low", difference.low), ("high", difference.high)):
            assert metrics[f"{steered}/{metric}_{end}"] == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert metrics[f"{steered}/vas_ratio_of_means_low"] > 0
    assert "own" in metrics


def test_the_module_s_own_metrics_and_weights_are_untouched(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    trainer = L.Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu")
    [alone] = trainer.validate(Foreign(), DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    metrics, _ = run(tmp_path, InterventionCallback(max_new_tokens=2), batches)
    assert metrics["own"] == alone["own"]


def test_foreign_batches_without_prompts_roles_or_columns(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    bare = [{k: v for k, v in b.items() if k not in ("prompt", "role_ids", "columns", "labels")} for b in batches]
    for batch in bare:
        batch |= {"id": ["x"] * 5, "source": ["y"] * 5}
        batch["mm_token_type_ids"] = (batch["input_ids"] == Foreign().net.config.image_token_id).long()
    callback = InterventionCallback(max_new_tokens=3, reward=length_reward)
    _, report = run(tmp_path / "bare", callback, bare)
    _, whole = run(tmp_path / "whole", InterventionCallback(max_new_tokens=3, reward=length_reward), batches)
    for name in whole["settings"]:
        ours, theirs = (r["settings"][name]["samples"] for r in (report, whole))
        assert [row["completion"] for row in ours] == [row["completion"] for row in theirs]
        assert [row["vas"] for row in ours] == pytest.approx([row["vas"] for row in theirs], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"image": [0.0, 0.5], "system": [0.0, 0.5]}, 3),
        ({"ablation": "layers"}, 5),
        ({"ablation": "heads", "layers": [1]}, 4),
        ({"ablation": "random_heads", "heads": {1: [0, 2]}, "num_random": 3}, 4),
    ],
    ids=["grid", "layers", "heads", "random heads"],
)
def test_schedules(tmp_path: Path, batches: list[dict[str, Any]], options: dict[str, Any], settings: int) -> None:
    callback = InterventionCallback(**options, max_new_tokens=1, max_batches=1)
    logger = TensorBoardLogger(tmp_path)
    _, report = run(tmp_path, callback, batches, logger=logger)
    assert len(report["settings"]) == 1 + settings
    assert report["num_samples"] == 5  # one batch
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["val/interventions"]
    assert f"val/{UNSTEERED.name}/vas" in events.Tags()["scalars"]


def test_a_validation_within_a_fit_is_left_alone(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    callback = InterventionCallback(max_new_tokens=1)
    trainer = L.Trainer(
        default_root_dir=tmp_path, callbacks=[callback], logger=False, enable_progress_bar=False, max_steps=1
    )
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Foreign(), loader, loader)
    assert not list(tmp_path.rglob("interventions"))


def test_samples_that_fill_up_count_once(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    batches[1]["columns"] = [column | {"repeated": True} for column in batches[1]["columns"]]
    _, report = run(tmp_path, InterventionCallback(max_new_tokens=1), batches)
    assert report["num_samples"] == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image": 0.0, "system": 0.0}, "steers nothing"),
        ({"max_new_tokens": 0}, "max_new_tokens=0, expected at least 1"),
        ({"queries": ["image"]}, "expected one or both of"),
        ({"mode": "post"}, "mode is 'post'"),
        ({"image": [0.1, 0.2], "ablation": "heads"}, "came with 2 combinations"),
    ],
)
def test_arguments_without_meaning(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        InterventionCallback(**options)


def test_nothing_to_decode_with(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="give InterventionCallback a `processor`"):
        run(tmp_path, InterventionCallback(), batches, module=Foreign(processor=False))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    options: dict[str, Any] = {"image": 3.0, "mode": "mass", "max_new_tokens": 2, "reward": length_reward}
    one, _ = run(tmp_path / "one", InterventionCallback(**options), batches)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        files = [tmp_path / f"{rank}.pt" for rank in range(2)]
        torch.save(batches, tmp_path / "batches.pt")
        pool.starmap(measure_on_rank, [(rank, tmp_path, options | {"reward": None}, files[rank]) for rank in range(2)])
    both = [torch.load(file) for file in files]
    for name, value in one.items():
        if name.startswith("val/"):
            assert both[0][name] == both[1][name]
            assert both[0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def measure_on_rank(rank: int, folder: Path, options: dict[str, Any], output: Path) -> None:
    """One of two processes, with one of the two batches."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getppid() % 2000)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
    callback = InterventionCallback(**options | {"reward": length_reward})
    mine = torch.load(folder / "batches.pt", weights_only=False)[rank : rank + 1]
    trainer = L.Trainer(
        default_root_dir=folder / f"rank_{rank}",
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(Foreign(), DataLoader(mine, batch_size=None), verbose=False)  # type: ignore[arg-type]
    torch.save({name: float(value) for name, value in trainer.callback_metrics.items()}, output)


def test_ablations_of_a_model_with_cross_attention_leave_it_out(tmp_path: Path) -> None:
    family = FAMILIES["Llama-3.2-Vision"]
    inputs, roles = family.make()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = family.build()

        def validation_step(self, batch: dict[str, Any], index: int) -> None:
            pass

    class Tokenizer:
        pad_token_id, eos_token_id = 0, 2
        apply_chat_template = None

        def batch_decode(self, tokens: Any, **_: Any) -> list[str]:
            return [str(row) for row in tokens.tolist()]

    module = Module()
    module.tokenizer = Tokenizer()
    batch = inputs | {"role_ids": roles, "columns": [{"answer": "1"}] * 2}
    _, report = run(tmp_path, InterventionCallback(ablation="layers", max_new_tokens=1), [batch], module=module)
    assert list(report["settings"]) == ["unsteered", "all layers", "without layer 0", "without layer 2"]
