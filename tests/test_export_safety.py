"""What `avar export` leaves when something goes wrong, and where it finds what a run has saved."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from avar_lightning.commands import main
from avar_lightning.export import ExportConfig, export, exporting, sources, write_folder
from avar_lightning.export.card import model_card
from avar_lightning.model import load_model
from avar_lightning.processing import load_processor
from avar_lightning.sharding import save_weights
from tests.breaking import killed


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder of the demo model."""
    folder = tmp_path_factory.mktemp("demo") / "hf"
    return write_folder(folder, load_model("demo"), load_processor("demo"), card="first")


@pytest.fixture
def there(demo, tmp_path):
    """One that was exported before, to be replaced."""
    return shutil.copytree(demo, tmp_path / "hf")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("how", ["a key is missing", "logits differ"])
def test_a_failed_check_leaves_what_was_there(there, demo, tmp_path, monkeypatch, capsys, how):
    fill = exporting.fill

    def spoil(folder, model, *args, **kwargs):
        state = dict(model.state_dict())
        if how == "a key is missing":
            del state["model.language_model.norm.weight"]
        else:
            state["model.language_model.norm.weight"] = state["model.language_model.norm.weight"] * 1.5
        fill(folder, model, *args, state_dict=state, **kwargs)

    monkeypatch.setattr(exporting, "fill", spoil)
    before = contents(there)
    assert main(["export", str(demo), str(there), "--overwrite", "--check"]) == 1
    assert "is not what it was made from" in capsys.readouterr().err
    assert contents(there) == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_logits_are_compared_in_the_type_that_is_written(demo, tmp_path):
    done = export(ExportConfig(str(demo), str(tmp_path / "hf"), dtype="bfloat16", check=True))
    assert done.difference < 1e-6


class Text:
    """What can be saved in no time, but for None."""

    def __init__(self, text):
        self.text = text

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(self.text)


def test_a_folder_that_a_kill_left_without_its_name_gets_it_back(tmp_path, monkeypatch):
    """Between its two renames; whatever fails next in the same place, what was there before is there again."""
    place = write_folder(tmp_path / "hf", Text("first"), Text("first"), card="first")
    before = contents(place)

    def write_another():
        with pytest.raises(TypeError):
            write_folder(place, Text(None), Text(None), card="third")

    for act in (write_another, lambda: main(["export", str(tmp_path / "nothing"), str(place)])):
        with killed(monkeypatch, 1, ("rename",)) as broken:
            write_folder(place, Text("second"), Text("second"), card="second")
        assert broken
        assert not place.exists()
        act()
        assert contents(place) == before
    write_folder(place, Text("last"), Text("last"), card="last")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Weights(Text, torch.nn.Module):
    """The same for what must be a module."""

    def __init__(self, text):
        torch.nn.Module.__init__(self)
        self.text = text


def test_weights_for_a_sampler_stay_whole_when_new_ones_cannot_be_written(tmp_path):
    save_weights(Weights("first"), tmp_path / "sync")
    before = contents(tmp_path / "sync")
    with pytest.raises(TypeError):
        save_weights(Weights(None), tmp_path / "sync")
    assert contents(tmp_path / "sync") == before
    assert [path.name for path in tmp_path.iterdir()] == ["sync"]


def test_the_best_checkpoint_may_lie_in_an_earlier_version(tmp_path):
    """Also after all versions of the run have moved."""
    runs, parts = tmp_path / "runs", ("version_0", "checkpoints", "epoch=0.ckpt")
    state = {"best_model_path": str(runs.joinpath(*parts)), "best_model_score": torch.tensor(0.5)}
    saved = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "callbacks": {"Checkpoint": state}}
    for name in ("version_0/checkpoints/epoch=0.ckpt", "version_1/checkpoints/last.ckpt"):
        (runs / name).parent.mkdir(parents=True)
        torch.save(saved, runs / name)
    assert sources._of_run(runs / "version_1", "auto") == runs.joinpath(*parts)
    moved = runs.rename(tmp_path / "moved")
    assert sources._of_run(moved / "version_1", "best") == moved.joinpath(*parts)
    (moved.joinpath(*parts)).unlink()
    with pytest.raises(FileNotFoundError, match="use --pick last"):
        sources._of_run(moved / "version_1", "auto")


def test_a_card_names_no_folder_of_its_author(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"vlm": {"pretrained": "/home/ann/models/base"}, "rewards": [{"function": "~/mine.py"}], "lr": 1e-3}
    about = {"adapters": True, "run": None, "settings": settings}
    for base in ("runs/hf", "/home/ann/models/hf", "~/models/hf", "../runs/hf"):
        Path("runs/hf").mkdir(parents=True, exist_ok=True)
        card = model_card("A name", base=base, **about)
        assert "base_model" not in yaml.safe_load(card.split("---")[1])
        assert not any(part in card for part in ("/home", "~/", "runs", "ann"))
        assert "`hf`" in card
    card = model_card("A name", base="Qwen/Qwen2.5-VL-7B-Instruct", **about)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert 'from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct"' in card
