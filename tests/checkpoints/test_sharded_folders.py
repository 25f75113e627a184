"""What processes that share a model save: the Hugging Face folder of FSDP2, and checkpoints of FSDP1."""

import pytest
from safetensors import safe_open

from avar_lightning.export import ExportConfig, export
from avar_lightning.model import load_model
from tests.checkpoints.running import book, run


def written(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.slow
def test_fsdp2_writes_tied_embeddings_once(write, tmp_path):
    options = ["--max-steps", 1, "--batch-size", 2, "--sharded", "--hf", tmp_path / "hf"]
    run(write(8), tmp_path / "run", *options, processes=2)
    assert len(written(tmp_path / "hf")) == len(list(load_model("demo").parameters()))
    assert not any("lm_head" in name for name in written(tmp_path / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_fsdp1_goes_on_bit_for_bit_and_is_exported(write, tmp_path, accumulate):
    """Folders of both processes; on one process they open too."""
    shards, options = write(24), ["--max-epochs", 1, "--batch-size", 2, "--accumulate", accumulate]
    run(shards, tmp_path / "whole", *options, "--fsdp1", processes=2)
    whole, saved = book(tmp_path / "whole", 2), tmp_path / "whole" / "step=2.ckpt"
    assert (saved / "meta.pt").is_file()
    run(shards, tmp_path / "cut", *options, "--fsdp1", "--resume", saved, processes=2)
    cut = book(tmp_path / "cut", 2)
    assert len(cut) == len(whole) - 2 * accumulate
    assert cut == whole[-len(cut) :]
    run(shards, tmp_path / "alone", *options, "--batch-size", 4, "--resume", saved)
    alone = book(tmp_path / "alone")
    for name in ("step", "lr", "samples"):
        assert [entry[name] for entry in alone] == [entry[name] for entry in cut]
    assert [entry["loss"] for entry in alone] == pytest.approx([entry["loss"] for entry in cut], rel=1e-4, abs=1e-5)
    done = export(ExportConfig(str(tmp_path / "whole" / "last.ckpt"), str(tmp_path / "hf"), check=True))
    assert done.difference < 1e-5
