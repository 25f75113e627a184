"""Checkpoints that hold what is not read from files that need not be trusted."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from avar_lightning.checkpoints import look_into


@dataclass
class Best:
    value: float = 1.0


@pytest.mark.parametrize(
    ("kept", "named"),
    [(Path("x"), "pathlib.PosixPath"), (np.float64(1), "numpy"), (Best(), f"{__name__}.Best")],
    ids=["path", "numpy", "dataclass"],
)
def test_types_that_are_not_read_are_named_and_no_damage(tmp_path, kept, named):
    path = tmp_path / "a.ckpt"
    saved = {
        "state_dict": {"w": torch.ones(2)},
        "pytorch-lightning_version": "2.6.6",
        "callbacks": {"Own": {"x": kept}},
    }
    torch.save(saved, path)
    with pytest.raises(ValueError, match="--weights_only false") as error:
        look_into(path)
    assert named in str(error.value)
    assert "damaged" not in str(error.value)
    assert look_into(path, trusted=True).extra["callbacks"] == saved["callbacks"]
    # As the sentence says.
    torch.save(torch.load(path, weights_only=False) | {"callbacks": {}}, path)
    assert look_into(path).shapes == {"w": torch.Size([2])}


def test_damage_is_damage(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "pytorch-lightning_version": "2.6.6"}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"state_dictq", b"state_\xff\xff\xff\xffq"))
    with pytest.raises(ValueError, match="it is damaged"):
        look_into(path)
