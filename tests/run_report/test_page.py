"""A report takes the place of an older one as a whole, whenever it is killed, and of nothing else."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from avar_lightning.run_report import page
from avar_lightning.run_report.page import Part, Section, refuse_existing, write_page


def write(folder: Path, *names: str, overwrite: bool = False) -> None:
    part = Part("part")
    for name in names:
        buffer = io.BytesIO()
        Image.new("L", (2, 2)).save(buffer, format="PNG")
        part.add(name, buffer.getvalue(), alt="alt", caption=f"caption of {name}")
    write_page(folder, "title", [Section("s", "p_", parts=[part])], command="c", made="now", overwrite=overwrite)


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_older_report_goes_with_all_its_pictures_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "a/report"
    write(folder, "one", "two")
    assert listed(folder) == {"index.html", "p_one.png", "p_two.png"}
    assert oct(folder.stat().st_mode) == oct((tmp_path / "a").stat().st_mode), "others may read it"
    write(folder, "two", "three", overwrite=True)
    assert listed(folder) == {"index.html", "p_two.png", "p_three.png"}
    assert listed(tmp_path / "a") == {"report"}


@pytest.mark.parametrize("name", ["mine.png", "notes.md", "folder"])
def test_what_a_user_put_beside_the_page_is_never_touched(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "report"
    write(folder, "one")
    (folder / name).mkdir() if name == "folder" else (folder / name).write_bytes(b"mine")
    before = listed(folder)
    with pytest.raises(FileExistsError, match=rf"holds '{name}', which is not of its report; move it away"):
        write(folder, "two", overwrite=True)
    assert listed(folder) == before


def test_neighbours_with_similar_names_are_never_touched(tmp_path: Path) -> None:
    for name in ("report.tmp", "report.old", ".report-x-abcdefgh.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = listed(tmp_path)
    write(tmp_path / "report", "one")
    write(tmp_path / "report", "two", overwrite=True)
    assert listed(tmp_path) == before | {"report"}
    assert all((tmp_path / name / "mine").exists() for name in before)


def test_what_is_no_report_is_refused_and_an_empty_folder_taken(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    write(tmp_path / "report", "one")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/index.html").write_text("<html>mine</html>")
    for name in ("file", "other"):
        with pytest.raises(FileExistsError, match="it is no report, so give another folder"):
            write(tmp_path / name, "one", overwrite=True)


def test_what_comes_while_pictures_are_drawn_is_not_overwritten(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "report", overwrite=False)
    write(tmp_path / "report", "theirs")
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        write(tmp_path / "report", "ours")


@pytest.mark.parametrize("what", ["write_text", "rename"])
def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    folder = tmp_path / "report"
    write(folder, "one")
    rename = os.rename

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    if what == "rename":  # the second one, by which the new report gets its name
        monkeypatch.setattr(page.os, "rename", lambda a, b: full() if Path(a).name == "new" else rename(a, b))
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"report cannot be written \(No space left on device\)"):
        write(folder, "two", overwrite=True)
    assert listed(folder) == {"index.html", "p_one.png"}
    assert listed(tmp_path) == {"report"}


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.run_report.test_page import write
left, rename = int(sys.argv[2]), os.rename

def dying(*names):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(*names)

os.rename = dying
write(Path(sys.argv[1]), "two", overwrite=True)
"""


@pytest.mark.parametrize("renames", range(3))
def test_whoever_is_killed_leaves_a_whole_report(tmp_path: Path, renames: int) -> None:
    """After the second step of three the new one has its name; before it the old one, or gets it back."""
    folder = tmp_path / "report"
    write(folder, "one")
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, str(renames)], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        refuse_existing(folder, overwrite=False)
    assert listed(folder) == {"index.html", "p_two.png" if renames == 2 else "p_one.png"}
    write(folder, "three", overwrite=True)
    assert listed(folder) == {"index.html", "p_three.png"}
