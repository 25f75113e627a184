"""`avar export`: from every kind of checkpoint to a folder that opens with the module's logits."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from peft import PeftModel
from transformers import AutoModelForImageTextToText, GenerationConfig

from avar_lightning import SFTModule
from avar_lightning.callbacks import Checkpoint
from avar_lightning.commands import main
from avar_lightning.data.writer import write_shards
from avar_lightning.export import ExportConfig, export
from avar_lightning.export.folder import answer_logits
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.model import LoRAConfig, VLMConfig, load_model
from avar_lightning.module import OptimizerConfig
from avar_lightning.processing import load_processor
from avar_lightning.quantization import QuantizationConfig
from tests.checkpoints.running import run as run_training
from tests.conftest import demo_data
from tests.data.conftest import make_sample
from tests.synthesis.small_vlm import save_small_vlm

FILES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
FILES |= {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def train(folder, make_data, *, lora=None, quantization=None):
    """Two steps on the demo model; a run's folder with a checkpoint, and the module."""
    torch.manual_seed(3)
    vlm = VLMConfig("demo", lora=lora, quantization=quantization)
    module = SFTModule(vlm, GuidanceConfig(form="hinge"), OptimizerConfig(lr=1e-2, warmup_fraction=0.0))
    saving = Checkpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=1, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[saving],
    )
    trainer.fit(module, make_data(batch_size=2, max_pixels=20000))
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"processor": "demo"}}}))
    before, after = {"val/accuracy": 0.25, "val/vas_response": 5.0}, {"val/accuracy": 0.5, "val/vas_response": 9.5}
    summary = {"before": before, "after": after, "steps": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder, module.eval()


@pytest.fixture(scope="module")
def full(tmp_path_factory, demo_folder):
    return train(tmp_path_factory.mktemp("run") / "full", lambda **options: demo_data(demo_folder, **options))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, demo_folder):
    def data(**options):
        return demo_data(demo_folder, **options)

    return train(tmp_path_factory.mktemp("run") / "adapted", data, lora=LoRAConfig(r=4))


def opened(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model):
    return answer_logits(model, load_processor("demo"))


def test_a_run_becomes_a_folder_with_the_modules_logits(full, tmp_path, capsys):
    run, module = full
    assert main(["export", str(run), str(tmp_path / "hf"), "--check"]) == 0
    assert "vllm serve" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == FILES | {"config.yaml"}
    torch.testing.assert_close(logits(opened(tmp_path / "hf")), logits(module.model), rtol=0, atol=0)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == module.model.generation_config.eos_token_id
    assert load_processor(tmp_path / "hf").image_processor.size["longest_edge"] == 20000
    # Where there is torchvision, the video processor is made from this file, by the name of the one for images.
    images = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "Qwen2VLImageProcessor"
    card = (tmp_path / "hf" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert "| accuracy | 0.25 | 0.5 |" in card
    assert "| VAS, response tokens | 5 | 9.5 |" in card
    assert "2603.03825" in card


def test_adapters_are_merged_or_kept(adapted, tmp_path):
    run, module = adapted
    done = export(ExportConfig(str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "merged"), check=True))
    assert done.merged
    assert not any("lora" in name for name in opened(tmp_path / "merged").state_dict())
    wanted = logits(module.model)
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(load_model("demo")), wanted, atol=1e-2)
    export(ExportConfig(str(run), str(tmp_path / "kept"), merge=False))
    kept = PeftModel.from_pretrained(load_model("demo"), tmp_path / "kept")
    torch.testing.assert_close(logits(kept), wanted, rtol=0, atol=0)
    export(ExportConfig(str(tmp_path / "kept"), str(tmp_path / "from folder")))
    torch.testing.assert_close(logits(opened(tmp_path / "from folder")), wanted, rtol=1e-4, atol=1e-4)
    module.save_pretrained(tmp_path / "fit", run)
    assert {p.name for p in (tmp_path / "fit").iterdir()} == {p.name for p in (tmp_path / "kept").iterdir()}


@pytest.mark.parametrize("prefix", ["state_dict", "model"], ids=["FSDP2", "FSDP"])
def test_folders_of_both_fsdp_open(full, tmp_path, prefix):
    """In the layout that Lightning's strategies give them; real ones of FSDP2 are in a slow test."""
    run, module = full
    saved = torch.load(run / "checkpoints" / "last.ckpt")
    dcp.save({prefix: saved.pop("state_dict")}, checkpoint_id=tmp_path / "folder.ckpt", no_dist=True)
    saved.pop("optimizer_states")
    torch.save(saved, tmp_path / "folder.ckpt" / "meta.pt")
    done = export(ExportConfig(str(tmp_path / "folder.ckpt"), str(tmp_path / "hf"), dtype="bfloat16", check=True))
    assert done.difference < 1e-6
    model = opened(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16())


def test_what_is_no_checkpoint_of_this_model_is_one_sentence(full, tmp_path, capsys):
    run, _ = full
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "half.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:100_000])
    saved = torch.load(run / "checkpoints" / "last.ckpt")
    name = "model.lm_head.weight"
    torch.save(
        {**saved, "state_dict": {k: v for k, v in saved["state_dict"].items() if k != name}}, tmp_path / "a.ckpt"
    )
    torch.save({**saved, "state_dict": saved["state_dict"] | {"model.more": torch.ones(1)}}, tmp_path / "b.ckpt")
    cases = [
        ([tmp_path / "nowhere.ckpt", tmp_path / "hf"], "There is no checkpoint at"),
        ([tmp_path / "half.ckpt", tmp_path / "hf"], "is no Lightning checkpoint"),
        ([tmp_path / "a.ckpt", tmp_path / "hf"], f"1 missing ({name})"),
        ([tmp_path / "b.ckpt", tmp_path / "hf"], "1 unexpected (model.more)"),
        ([run, tmp_path / "taken"], "is no exported model, so give another folder"),
        ([run, tmp_path / "taken", "--overwrite"], "is no exported model, so give another folder"),
        ([run, tmp_path / "hf", "--no-merge"], "has no adapters"),
        ([tmp_path / "taken", tmp_path / "hf"], "is nothing that can be exported"),
    ]
    for options, sentence in cases:
        assert main(["export", *map(str, options)]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ")
        assert sentence in said
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "taken" / "thesis.txt").exists()


def test_the_best_checkpoint_of_a_run_is_taken_where_one_was_monitored(full, tmp_path):
    run, _ = full
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    folder = copied / "checkpoints"
    saved = torch.load(folder / "last.ckpt")
    best = saved | {"state_dict": {name: tensor * 0.5 for name, tensor in saved["state_dict"].items()}}
    torch.save(best, folder / "best.ckpt")
    state = next(state for key, state in saved["callbacks"].items() if "Checkpoint" in key)
    state |= {"best_model_path": "/moved/since/checkpoints/best.ckpt", "best_model_score": torch.tensor(0.5)}
    torch.save(saved, folder / "last.ckpt")
    for pick, factor in (("auto", 0.5), ("best", 0.5), ("last", 1.0)):
        export(ExportConfig(str(copied), str(tmp_path / "hf"), pick=pick, overwrite=True))
        weight = opened(tmp_path / "hf").get_output_embeddings().weight
        assert torch.equal(weight, saved["state_dict"]["model.lm_head.weight"] * factor)


@pytest.mark.slow
def test_a_4_bit_run_is_merged_into_full_precision(tmp_path, make_data):
    run, module = train(tmp_path / "run", make_data, lora=LoRAConfig(r=4), quantization=QuantizationConfig())
    export(ExportConfig(str(run), str(tmp_path / "merged"), check=True))
    export(ExportConfig(str(run), str(tmp_path / "kept"), merge=False))
    plain = load_model(replace(module.vlm, quantization=None, lora=None))
    kept = PeftModel.from_pretrained(plain, tmp_path / "kept").eval()
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), logits(kept), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--lora"]], ids=["full", "lora"])
def test_a_folder_of_two_processes_is_exported(tmp_path, options):
    write_shards([make_sample(index) for index in range(16)], tmp_path / "shards")
    common = [str(tmp_path / "shards"), tmp_path / "run", *options, "--max-steps", 2, "--batch-size", 2]
    run_training(*common, "--sharded", processes=2)
    run_training(str(tmp_path / "shards"), tmp_path / "file", *common[2:], "--sharded", "--one-file", processes=2)
    for kind in ("run", "file"):
        export(ExportConfig(str(tmp_path / kind / "last.ckpt"), str(tmp_path / f"hf {kind}"), check=True))
    pair = [opened(tmp_path / f"hf {kind}").state_dict() for kind in ("run", "file")]
    assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())


@pytest.mark.slow
def test_transformers_serve_answers_with_an_exported_model(tmp_path):
    """A LLaVA: without torchvision `transformers serve` cannot open the processors of families that know videos."""
    save_small_vlm(tmp_path / "small", ["It is ", "dark ", "red."])  # an odd number, as its width asks
    export(ExportConfig(str(tmp_path / "small"), str(tmp_path / "hf"), check=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", tmp_path / "hf", "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.3)
        asked = {
            "model": str(tmp_path / "hf"),
            "messages": [{"role": "user", "content": "Which colour?"}],
            "max_tokens": 8,
            "temperature": 0.0,
        }
        answer = httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=120, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "It is dark red."
    finally:
        server.terminate()
        server.wait(timeout=30)
