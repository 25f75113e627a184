"""The built wheel, installed apart from the checkout, trains the demo from another directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "avar_lightning", "callbacks")

# What a user's own script does; the last line tells this test what happened.
SCRIPT = """
import json
import sys

import lightning as L

from avar_lightning import SFTModule
from avar_lightning.callbacks import VASCallback
from avar_lightning.data import DemoDataModule
from avar_lightning.model import VLMConfig

module = SFTModule(VLMConfig(pretrained="demo", from_scratch=True))
data = DemoDataModule(folder="shards", num_train=64, num_val=10, batch_size=8, num_workers=0)
trainer = L.Trainer(
    accelerator="cpu", max_steps=2, val_check_interval=2, callbacks=[VASCallback()], enable_progress_bar=False
)
trainer.fit(module, data)
module.save_pretrained("saved")
files = {name: m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "avar_lightning"}
vas = trainer.callback_metrics["val/vas"].item()
print(json.dumps({"files": files, "steps": trainer.global_step, "vas": vas}))
"""


def run(*command: str | Path, **options) -> str:
    """Standard output of a command that must succeed; its whole output where it does not."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources: a build in the checkout would pick up what older ones left there."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "sources").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "sources")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder / "dist", folder / "sources")
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_with_its_data_and_nothing_else(wheel):
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT) for path in (ROOT / "avar_lightning").rglob("*") if path.is_file()}
    callbacks = {Path("avar_lightning/callbacks", path.name) for path in (ROOT / "callbacks").glob("*.py")}
    assert names == {path for path in package if "__pycache__" not in path.parts} | callbacks


@pytest.mark.slow
def test_installed_wheel_trains_from_another_directory(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    elsewhere.mkdir()
    (elsewhere / "script.py").write_text(SCRIPT)
    # On PYTHONPATH it comes before the editable install of the checkout.
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = json.loads(run(sys.executable, "script.py", cwd=elsewhere, env=environment).splitlines()[-1])

    assert {"avar_lightning", "avar_lightning.callbacks.vas", "avar_lightning.sft"} <= result["files"].keys()
    assert not {name: file for name, file in result["files"].items() if not file.startswith(str(site))}
    assert result["steps"] == 2
    assert result["vas"] > 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in elsewhere.glob("saved/*")}
