"""The README's way from a folder of images to a guided run, as it stands there."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from avar_lightning import cli, commands

ROOT = Path(__file__).parents[1]
SECTION = "## Your data: from a folder of images to a guided run"


def written_commands() -> list[list[str]]:
    """Command lines of the first block of shell in the section."""
    section = (ROOT / "README.md").read_text().split(SECTION)[1]
    block = section.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines() if line.strip()]


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_guided_run(tmp_path, monkeypatch, capsys):
    section = (ROOT / "README.md").read_text().split(SECTION)[1]
    record = json.loads(section.split("```json\n")[1].split("```")[0].replace("…]", "]").replace(",\n ]", "]"))[0]
    (tmp_path / "charts" / "images").mkdir(parents=True)
    records = []
    for index in range(600):
        Image.new("RGB", (56, 56), (index % 256, 0, 90)).save(tmp_path / f"charts/images/{index}.jpg")
        records.append(record | {"id": f"chart-{index}", "images": [f"images/{index}.jpg"]})
    (tmp_path / "charts" / "train.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    convert, validate, fit, large = written_commands()
    assert (convert[:2], validate[:2], fit[:3]) == (
        ["avar", "convert"],
        ["avar", "convert"],
        ["python", "train.py", "fit"],
    )
    assert commands.main(convert[1:]) == 0
    assert commands.main(validate[1:]) == 0
    assert "600 samples in 6 shard(s), all good" in capsys.readouterr().out
    quick = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
    assert cli.main([*fit[2:], *quick, "--model.max_new_tokens", "4"]) == 0
    summary = json.loads(next(tmp_path.glob("runs/avar_sft/version_0/summary.json")).read_text())
    assert summary["steps"] == 2
    assert summary["after"]["val/image_share_response"] > 0
    assert large[:3] == ["python", "train.py", "fit"]
    assert {value for value in fit if "shard-" in value} == {value for value in large if "shard-" in value}
