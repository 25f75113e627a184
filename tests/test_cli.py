import json
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from avar_lightning.cli import AvarCLI, main

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = str(CONFIGS / "avar_sft.yaml")
ON_ONE_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32"]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
BLANK_DEMO = ["--model.init_args.vlm.pretrained=demo", "--model.init_args.vlm.from_scratch=true"]


def options(folder, **data):
    data = {"folder": folder / "data", "num_train": 32, "num_val": 5, "batch_size": 8, "num_workers": 0} | data
    return [
        *("fit", "--config", BASE, *BLANK_DEMO, "--trainer.accelerator=cpu", "--trainer.max_steps=4"),
        *("--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"),
        *("--model.init_args.max_new_tokens=4", f"--trainer.logger.init_args.save_dir={folder / 'runs'}"),
        *(f"--data.init_args.{name}={value}" for name, value in data.items()),
    ]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_builds_offline(path):
    recipe = "avar_grpo.yaml" if "grpo" in path.name else "avar_sft.yaml"
    recipe = "demo_pretrain.yaml" if path.name.startswith("demo_pretrain") else recipe
    files = [option for name in dict.fromkeys([recipe, path.name]) for option in ("--config", str(CONFIGS / name))]
    cli = build([*files, *BLANK_DEMO, *ON_ONE_CPU])
    written = yaml.safe_load(path.read_text())
    for name, value in written.get("model", {}).get("init_args", {}).get("guidance", {}).items():
        assert getattr(cli.model.guidance, name) == value
    assert type(cli.datamodule).__name__ == cli.config.data.class_path.rpartition(".")[2]
    cli.model.configure_model()
    assert any(p.requires_grad for p in cli.model.parameters())


@pytest.mark.parametrize("option", ["--model.init_args.vlm.pretrained=demo_sft", "--model.vlm.pretrained=demo_sft"])
def test_the_data_have_the_processor_of_the_model(option):
    assert build(["--config", BASE, *ON_ONE_CPU]).datamodule.processor_source == "demo"
    assert build(["--config", BASE, *ON_ONE_CPU, option]).datamodule.processor_source == "demo_sft"
    own = "--data.init_args.processor=elsewhere"
    assert build(["--config", BASE, *ON_ONE_CPU, option, own]).datamodule.processor_source == "elsewhere"


def build(args):
    import lightning as L

    return AvarCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=args,
    )


def test_the_7b_run_is_the_papers():
    written = yaml.safe_load((CONFIGS / "qwen2_5_vl_7b_full_8x80gb.yaml").read_text())
    parser = ArgumentParser()
    parser.add_argument("--strategy", type=Strategy)
    strategy = parser.instantiate(parser.parse_object({"strategy": written["trainer"]["strategy"]})).strategy
    assert isinstance(strategy, FSDPStrategy)
    assert Qwen2_5_VLDecoderLayer in strategy.kwargs["auto_wrap_policy"]._module_classes
    trainer, model = written["trainer"], written["model"]["init_args"]
    assert trainer["devices"] * written["data"]["init_args"]["batch_size"] * trainer["accumulate_grad_batches"] == 512
    assert trainer["max_epochs"] == 20
    assert model["optimizer"]["lr"] == 5e-6
    assert model["guidance"] == {"form": "published", "alpha": 0.15, "beta": 0.15, "queries": ["user"]}


def test_the_7b_reinforcement_learning_is_the_papers():
    written = yaml.safe_load((CONFIGS / "qwen2_5_vl_7b_grpo.yaml").read_text())
    base = yaml.safe_load((CONFIGS / "avar_grpo.yaml").read_text())["model"]["init_args"]
    trainer, model = written["trainer"], written["model"]["init_args"]
    assert trainer["devices"] * written["data"]["init_args"]["batch_size"] == 256
    assert (trainer["max_epochs"], model["optimizer"]["lr"]) == (4, 1e-6)
    assert trainer["precision"] == "bf16-mixed"  # bfloat16 weights would not feel updates of 1e-6
    assert (model["grpo"]["num_generations"], model["grpo"]["beta"]) == (8, 0.0)
    assert model["visual"] == {"transform": "ratio", "weight": 0.3}
    assert {reward["function"].rpartition(".")[2]: reward["weight"] for reward in base["rewards"]} == {
        "accuracy_reward": 1.0,
        "format_reward": 0.1,
    }


def test_reinforcement_learning_writes_everything_it_says(tmp_path):
    config = str(CONFIGS / "avar_grpo.yaml")
    data = {"folder": tmp_path / "data", "num_train": 16, "num_val": 5, "batch_size": 3, "num_workers": 0}
    arguments = ["fit", "--config", config, "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    arguments += ["--trainer.val_check_interval=2", "--model.init_args.max_new_tokens=4"]
    arguments += ["--model.init_args.sampling.max_new_tokens=8", "--model.init_args.grpo.num_generations=4"]
    arguments += [f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"]
    assert main([*arguments, *(f"--data.init_args.{name}={value}" for name, value in data.items())]) == 0
    folder = tmp_path / "runs" / "avar_grpo" / "version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"reward/total", "reward/visual", "rollout/vas", "val/accuracy", "val/vas"} <= summary["before"].keys()
    assert {"reward/total", "train/kl", "train/clip_fraction_high", "val/accuracy"} <= summary["after"].keys()
    lines = [json.loads(line) for line in (folder / "completions" / "step_00000001.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert {"question", "answer", "completion", "accuracy", "format", "visual", "total", "vas"} <= lines[0].keys()
    assert (folder / "completions" / lines[0]["images"][0]).is_file()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    assert "completions/text_summary" in events.Tags()["tensors"]
    assert "completions/prompt_0" in events.Tags()["images"]
    exported = AutoModelForImageTextToText.from_pretrained(folder / "hf")
    assert exported.config.model_type == "qwen2_5_vl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Where a training of four steps was run."""
    place = tmp_path_factory.mktemp("finished")
    assert main(options(place)) == 0
    return place


def test_fit_writes_everything_it_says(finished):
    folder = finished / "runs" / "avar_sft" / "version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4
    wanted = {"val/accuracy", "val/vas", "val/vas_response", "val/loss"}
    assert wanted <= summary["before"].keys()
    assert wanted <= summary["after"].keys()
    assert summary["before"]["val/loss"] > summary["after"]["val/loss"]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert wanted | {"train/loss", "train/loss_lm", "train/image_share"} <= set(events.Tags()["scalars"])
    assert any("vas/map" in tag for tag in events.Tags()["images"])
    assert len(events.Scalars("val/vas")) == 3  # before training, in the middle, at the end
    AutoModelForImageTextToText.from_pretrained(folder / "hf")
    assert (folder / "config.yaml").is_file()
    assert list((folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
def test_resume_goes_on_from_the_checkpoint(finished):
    checkpoint = next((finished / "runs").rglob("last*.ckpt"))
    assert main([*options(finished), "--trainer.max_steps=6", f"--ckpt_path={checkpoint}"]) == 0
    summary = json.loads((finished / "runs" / "avar_sft" / "version_1" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 4


def refused(capsys, args, status):
    """The sentence on standard error of a command that must fail with `status`."""
    if status == 2:
        with pytest.raises(SystemExit) as left:
            main(args)
        assert left.value.code == 2
    else:
        assert main(args) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"model": {"class_path": "avar_lightning.SFTModule", "init_args": {"guidance": {"alfa": 1}}}}, "'alfa'"),
        ({"trainer": {"max_stepz": 3}}, "trainer.max_stepz"),
        ({"modle": 3}, "'modle'"),
        (
            {"data": {"class_path": "avar_lightning.data.DemoDataModule", "init_args": {"bacth_size": 3}}},
            "'bacth_size'",
        ),
    ],
)
def test_unknown_key_in_a_config_is_named(tmp_path, capsys, written, words):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(written))
    assert words in refused(capsys, ["fit", "--config", BASE, "--config", str(tmp_path / "bad.yaml")], 2)


@pytest.mark.parametrize(
    ("override", "status", "words"),
    [
        ("--model.guidance.form=strong", 2, "model.guidance.form: Expected one of 'none', 'published'"),
        ("--model.guidance.target=3", 1, "guidance.target=3.0 is no share"),
        ("--model.vlm.pretrained=./nowhere", 1, "No model at './nowhere'"),
        ("--model.guidance.layers=[9]", 1, "9"),
    ],
)
def test_meaningless_values_are_named(tmp_path, capsys, override, status, words):
    assert words in refused(capsys, [*options(tmp_path), override], status)


@pytest.mark.parametrize(
    ("option", "status", "words"),
    [
        ("--trainer.strategy=fsdp3", 1, "strategy='fsdp3'"),
        pytest.param("--trainer.accelerator=gpu", 1, "No supported gpu", marks=WITHOUT_GPU),
        ("--trainer.max_step=3", 2, "max_step"),
    ],
)
def test_what_the_trainer_does_not_take_is_named(tmp_path, capsys, option, status, words):
    assert words in refused(capsys, [*options(tmp_path), option], status)


def test_trying_says_that_nothing_is_kept(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("avar_lightning.cli.rank_zero_info", said.append)
    monkeypatch.chdir(tmp_path)
    assert main([*options(tmp_path), "--trainer.fast_dev_run=true"]) == 0
    assert said[-1].endswith("kept         nothing (fast_dev_run)")
    assert "None" not in said[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_missing_shards_are_named(tmp_path, capsys):
    data = [
        *("--data=avar_lightning.data.ShardDataModule", f"--data.init_args.train={tmp_path}/none-{{0..3}}.tar"),
        *("--data.init_args.num_workers=0", "--data.init_args.batch_size=8"),
    ]
    args = [
        "fit",
        "--config",
        BASE,
        *BLANK_DEMO,
        "--trainer.accelerator=cpu",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        *data,
    ]
    assert "none-" in refused(capsys, args, 1)


def test_faults_of_our_own_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("avar_lightning.sft.SFTModule.training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(options(tmp_path))
