"""VASCallback in somebody else's LightningModule, against float64 eager attention and sums made by hand."""

import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import LoraConfig, get_peft_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from avar_lightning.callbacks import VASCallback
from avar_lightning.roles import Role
from tests.factories import Conversation, make_batch, tiny_vlm

NOT_INPUTS = ("role_ids", "columns", "images")


class Foreign(L.LightningModule):
    """Somebody else's module: own names, own loss, knows nothing of roles or attention."""

    def __init__(self, vlm: torch.nn.Module | None = None, broken: bool = False) -> None:
        super().__init__()
        self.net = vlm or tiny_vlm()
        self.broken = broken

    def loss(self, batch: dict[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        return self.net(**inputs, labels=batch["input_ids"]).loss

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        if self.broken:
            raise RuntimeError("out of paper")
        self.log("val/own", self.loss(batch), batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> list[dict[str, Any]]:
    """Two batches of two samples, padded right and left; the last has no image, the third no response."""
    made = [
        make_batch(Conversation(), Conversation(system=5, after=6), seed=1),
        make_batch(Conversation(response=0), Conversation(images=0), padding_side="left", seed=2),
    ]
    columns = [[{"id": f"{row}{column}"} for column in range(2)] for row in range(2)]
    return [m.inputs | {"role_ids": m.role_ids, "columns": c} for m, c in zip(made, columns, strict=True)]


def loader(data: list[dict[str, Any]] | None = None) -> DataLoader[Any]:
    return DataLoader(data if data is not None else batches(), batch_size=None)  # type: ignore[arg-type]


def trainer_in(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False} | quiet
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(defaults | options))


def reports(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.rglob("vas/*.json"))}


def measure(folder: Path, module: L.LightningModule, data: Any = None, **options: Any) -> dict[str, Any]:
    """Validate once and give the JSON."""
    callback = VASCallback(**options)
    trainer_in(folder, callback).validate(module, loader(data), verbose=False)
    return reports(folder)["step_00000000.json"]


def attention_of(vlm: Any, batch: dict[str, Any]) -> np.ndarray:
    """Eager float64 attention (L, B, H, N, N) of a copy of the model."""
    oracle = tiny_vlm("eager", dtype=torch.float64)
    oracle.load_state_dict(vlm.state_dict())
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k not in NOT_INPUTS}
    with torch.no_grad():
        return torch.stack(oracle(**inputs, output_attentions=True).attentions).numpy()


def ratios_by_hand(vlm: Any, data: list[dict[str, Any]], query: Role) -> list[list[tuple[float, float]]]:
    """For each sample, (image mass, system mass) of every layer, head and query token."""
    samples = []
    for batch in data:
        attention = attention_of(vlm, batch)
        for row, roles in enumerate(batch["role_ids"].numpy()):
            pairs = []
            for layer in range(attention.shape[0]):
                for head in range(attention.shape[2]):
                    for token in np.flatnonzero(roles == query):
                        weights = attention[layer, row, head, token]
                        pairs.append((weights[roles == Role.IMAGE].sum(), weights[roles == Role.SYSTEM].sum()))
            samples.append(pairs)
    return samples


@pytest.mark.parametrize(("query", "scored"), [("user", [0, 1, 2]), ("response", [0, 1])])
def test_values_are_those_of_eager_attention(tmp_path: Path, query: str, scored: list[int]) -> None:
    module = Foreign()
    report = measure(tmp_path, module)
    samples = ratios_by_hand(module.net, batches(), Role[query.upper()])
    by_hand = [np.mean([image / system for image, system in samples[index]]) for index in scored]
    means = [np.sum(samples[index], axis=0) for index in scored]
    medians = [np.median([image / system for image, system in samples[index]]) for index in scored]
    suffix = "" if query == "user" else "_response"
    assert report["metrics"][f"val/vas{suffix}"] == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert report[query]["mean_of_ratios"] == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert report[query]["ratio_of_means"] == pytest.approx(np.mean([v / s for v, s in means]), rel=1e-4)
    assert report[query]["median"] == pytest.approx(np.mean(medians), rel=1e-4)
    assert 0 < report["metrics"][f"val/image_share{suffix}"] < 1
    assert np.mean(report[query]["map"]) == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert report[query]["num_scored"] == len(scored)
    of_samples = [sample[query]["mean_of_ratios"] for sample in report["samples"]]
    assert [value is not None for value in of_samples] == [index in scored for index in range(4)]
    assert [sample["id"] for sample in report["samples"]] == ["00", "01", "10", "11"]


def test_shares_are_the_mean_mass_on_each_role(tmp_path: Path) -> None:
    module, data = Foreign(), batches()[:1]
    report = measure(tmp_path, module, data)
    attention, roles = attention_of(module.net, data[0]), data[0]["role_ids"].numpy()
    for role in (Role.SYSTEM, Role.USER, Role.IMAGE, Role.RESPONSE):
        samples = []
        for row in range(2):
            rows = attention[:, row][:, :, roles[row] == Role.RESPONSE]
            samples.append(rows[..., roles[row] == role].sum(-1).mean((1, 2)))
        expected = np.mean(samples, axis=0)
        np.testing.assert_allclose(
            report["response"]["attention_shares"][role.name.lower()], expected, rtol=1e-4, atol=1e-7
        )


def test_tensorboard_gets_scalars_and_pictures_from_the_baseline_on(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    callback = VASCallback(num_overlays=1)
    trainer = trainer_in(tmp_path, callback, logger=logger, log_every_n_steps=1)
    trainer.fit(Foreign(), loader(), loader())
    events = EventAccumulator(logger.log_dir).Reload()
    for query in ("", "_response"):
        for name in ("val/vas", "val/vas_ratio_of_means", "val/image_share"):
            # Lightning counts the step of a validation's scalars from 0: after 2 steps it is 1.
            assert [event.step for event in events.Scalars(name + query)] == [0, 1]
    assert events.Scalars("val/vas")[0].value == pytest.approx(callback.baseline["val/vas"])
    assert events.Scalars("val/vas")[1].value == pytest.approx(callback.latest["val/vas"])
    assert events.Scalars("val/own")[0].value == pytest.approx(callback.baseline["val/own"])
    pictures = {"vas/map_user", "vas/map_response", "vas/shares_user", "vas/shares_response", "vas/overlay_0"}
    assert set(events.Tags()["images"]) == pictures
    assert [event.step for event in events.Images("vas/map_user")] == [0, 2]
    assert {p.name for p in (Path(logger.log_dir) / "vas").glob("*.json")} == {
        "step_00000000.json",
        "step_00000002.json",
    }


def test_baseline_is_the_model_before_training_and_leaks_into_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = measure(tmp_path / "before", Foreign())["metrics"]
    results = {}
    for taken in (True, False):
        callback = VASCallback(baseline=taken)
        trainer = trainer_in(tmp_path / str(taken), callback, num_sanity_val_steps=1)
        trainer.fit(Foreign(), loader(), loader())
        results[taken] = callback.latest
        assert callback.baseline == (pytest.approx(before) if taken else {})
        names = ["step_00000000.json", "step_00000002.json"] if taken else ["step_00000002.json"]
        assert list(reports(tmp_path / str(taken))) == names
        assert {k: float(v) for k, v in trainer.callback_metrics.items()} == pytest.approx(callback.latest)
    assert results[True] == pytest.approx(results[False])
    assert results[True]["val/vas"] != pytest.approx(before["val/vas"])
    first, last = reports(tmp_path / "True").values()
    assert (first["baseline"], last["baseline"]) == (True, False)
    assert (last["step"], last["epoch"], last["num_samples"]) == (2, 0, 4)


def test_resumed_run_keeps_the_baseline(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="first")
    first = VASCallback()
    trainer_in(tmp_path / "a", first, saver, enable_checkpointing=True).fit(Foreign(), loader(), loader())
    second = VASCallback()
    trainer = trainer_in(tmp_path / "b", second, max_epochs=2)
    trainer.fit(Foreign(), loader(), loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=False)
    assert second.baseline == first.baseline != {}
    assert list(reports(tmp_path / "b")) == ["step_00000004.json"]


def hooks_of(module: Foreign) -> int:
    decoder = module.net.get_decoder()  # type: ignore[operator]
    return len(decoder._forward_pre_hooks) + len(decoder._forward_hooks)


def test_model_is_left_alone_after_an_error_in_validation_step(tmp_path: Path) -> None:
    module = Foreign(broken=True)
    before = hooks_of(module)
    with pytest.raises(RuntimeError, match="out of paper"):
        measure(tmp_path, module)
    assert hooks_of(module) == before
    assert not reports(tmp_path)


def test_output_of_the_model_does_not_change(tmp_path: Path) -> None:
    module, batch = Foreign(), batches()[0]
    with torch.no_grad():
        alone = module.loss(batch)
        trainer = trainer_in(tmp_path, VASCallback())
        watched = trainer.validate(module, loader([batch]), verbose=False)[0]["val/own"]
        again = module.loss(batch)
    assert watched == alone.item() == again.item()


def test_second_forward_is_not_made_and_generation_is_not_measured(tmp_path: Path) -> None:
    class Generating(Foreign):
        forwards = 0

        def validation_step(self, batch: dict[str, Any], index: int) -> None:
            super().validation_step(batch, index)
            prompt = make_batch(Conversation(response=0), seed=5).inputs
            self.net.generate(**prompt, max_new_tokens=3, do_sample=False)  # type: ignore[operator]

        def loss(self, batch: dict[str, Any]) -> Tensor:
            self.forwards += 1
            return super().loss(batch)

    plain = measure(tmp_path / "plain", Foreign())
    module = Generating()
    assert measure(tmp_path / "generating", module) == plain
    assert module.forwards == 2


def test_adapters_do_not_hide_the_model(tmp_path: Path) -> None:
    plain = measure(tmp_path / "plain", Foreign())
    adapted = Foreign(get_peft_model(tiny_vlm(), LoraConfig(r=2, target_modules=["q_proj"])))  # type: ignore[arg-type]
    assert measure(tmp_path / "lora", adapted)["user"] == plain["user"]


def test_batches_without_roles_use_the_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    plain = measure(tmp_path / "plain", Foreign(), data)
    known = {batch["input_ids"].sum().item(): batch.pop("role_ids") for batch in data}
    seen = []

    def tagger(input_ids: Tensor, source: Any, *, attention_mask: Tensor | None = None) -> Tensor:
        seen.append((source, attention_mask is not None))
        return known[input_ids.sum().item()]

    monkeypatch.setattr("avar_lightning.callbacks.foreign.tag_roles", tagger)
    module = Foreign()
    with pytest.raises(ValueError, match="has no 'role_ids' and neither Foreign nor its datamodule"):
        measure(tmp_path / "without", module, data)
    module.tokenizer = Template()  # type: ignore[assignment]
    assert measure(tmp_path / "with", module, data) == plain
    assert seen == [(module.tokenizer, True)] * 2


class Template:
    """What a tokenizer looks like from afar."""

    def apply_chat_template(self) -> None: ...


def test_forward_on_other_tokens_is_an_error_at_the_end(tmp_path: Path) -> None:
    class Elsewhere(Foreign):
        def validation_step(self, batch: dict[str, Any], index: int) -> None:
            self.loss(make_batch(Conversation(after=20)).inputs)

    with pytest.raises(ValueError, match="saw no forward of the model over batch\\['input_ids'\\] in 2 validation"):
        measure(tmp_path, Elsewhere())


def test_partly_matching_validation_warns(tmp_path: Path) -> None:
    class Sometimes(Foreign):
        def validation_step(self, batch: dict[str, Any], index: int) -> None:
            if index == 0:
                super().validation_step(batch, index)

    with pytest.warns(UserWarning, match="left out 1 of 2 validation batches"):
        report = measure(tmp_path, Sometimes())
    assert report["num_samples"] == 2


def test_text_only_validation_is_undefined_and_says_so(tmp_path: Path) -> None:
    text = make_batch(Conversation(images=0))
    with pytest.warns(UserWarning, match="val/vas, .*val/image_share_response undefined and not logged"):
        report = measure(tmp_path, Foreign(), [text.inputs | {"role_ids": text.role_ids}])
    assert set(report["metrics"]) == {"val/own"}
    assert report["user"]["mean_of_ratios"] is None
    assert report["samples"][0]["id"] is None


def test_options_bound_what_is_measured(tmp_path: Path) -> None:
    report = measure(tmp_path, Foreign(), max_batches=1, layers=[1], queries=["response"], reduction="share")
    assert report["num_samples"] == 2
    assert report["layers"] == [1]
    assert np.shape(report["response"]["map"]) == (1, 4)
    assert "user" not in report
    assert "val/vas" not in report["metrics"]
    assert report["metrics"]["val/vas_response"] == report["metrics"]["val/image_share_response"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": []}, r"queries=\[\], expected one or both of"),
        ({"queries": ["system"]}, r"queries=\['system'\]"),
        ({"max_batches": 0}, "max_batches=0, expected at least 1"),
        ({"num_overlays": -1}, "num_overlays=-1"),
        ({"reduction": "best"}, "reduction='best', expected one of"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VASCallback(**options)


def test_help_explains_every_option() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(VASCallback, "vas")
    text = parser.format_help()
    for name in inspect.signature(VASCallback).parameters:
        assert f"--vas.{name}" in text
    assert "keep its result as the baseline" in " ".join(text.split())


def test_loggers_without_pictures_get_numbers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    trainer = trainer_in(tmp_path, VASCallback(), logger=logger)
    trainer.fit(Foreign(), loader(), loader())
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert "val/vas_response" in rows[0]
    assert len(reports(Path(logger.log_dir))) == 2


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    callback = VASCallback()
    trainer_in(tmp_path, callback, fast_dev_run=True).fit(Foreign(), loader(), loader())
    assert not list(tmp_path.rglob("*.json"))
    assert callback.baseline == {}


def test_overlay_is_the_mean_attention_of_the_response(tmp_path: Path) -> None:
    module, data = Foreign(), batches()
    report = measure(tmp_path, module, data, num_overlays=5)
    assert [overlay["id"] for overlay in report["overlays"]] == ["00", "01"]
    attention, roles = attention_of(module.net, data[0]), data[0]["role_ids"].numpy()
    rows = attention[:, 1][:, :, roles[1] == Role.RESPONSE][..., roles[1] == Role.IMAGE]
    np.testing.assert_allclose(report["overlays"][1]["grid"], rows.mean((0, 1, 2)).reshape(2, 2), rtol=1e-4)
    assert all(math.isfinite(value) for row in report["overlays"][0]["grid"] for value in row)


def test_the_images_of_overlays_lie_beside_the_json(tmp_path: Path) -> None:
    """They are those of the batch, and no loggers are needed."""
    data = batches()
    red, wide = Image.new("RGB", (6, 4), "red"), Image.new("L", (2048, 8), 7)
    measure(tmp_path, Foreign(), [data[0] | {"images": [[red], [wide]]}, *data[1:]])
    assert sorted(path.name for path in tmp_path.rglob("vas/*.*")) == [
        *("overlay_0.png", "overlay_1.png"),
        "step_00000000.json",
    ]
    first, second = (Image.open(tmp_path / f"vas/overlay_{number}.png") for number in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(red))
    assert (second.size, second.getpixel((0, 0))) == ((512, 2), (7, 7, 7)), "shrunk, and RGB"


class Halves(torch.utils.data.Dataset[dict[str, Any]]):
    """Each batch of `batches` once; DDP's sampler gives one to each of two processes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return batches()[index]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    alone = measure(tmp_path / "one", Foreign())
    trainer = trainer_in(tmp_path / "two", VASCallback(), strategy="ddp_spawn", devices=2)
    trainer.validate(Foreign(), DataLoader(Halves(), batch_size=None), verbose=False)
    together = reports(tmp_path / "two")["step_00000000.json"]
    assert together["num_samples"] == 4
    for query in ("user", "response"):
        for reduction in ("mean_of_ratios", "ratio_of_means", "share", "median", "num_scored"):
            assert together[query][reduction] == pytest.approx(alone[query][reduction], rel=1e-6)
        np.testing.assert_allclose(together[query]["map"], alone[query]["map"], rtol=1e-6)
    vas = [name for name in alone["metrics"] if "own" not in name]
    assert {name: together["metrics"][name] for name in vas} == pytest.approx({n: alone["metrics"][n] for n in vas})


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
