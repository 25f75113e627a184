"""`avar report`: one page with everything inside, safe against what files say, whole or not there."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from avar_lightning.commands import main
from avar_lightning.run_report.accuracy import accuracy_part
from avar_lightning.run_report.report import name_runs
from avar_lightning.run_report.runs import Run, open_run
from tests.run_report.written_runs import measurement, write_events, write_measurements

USER: dict[str, Any] = {"response": None}  # fewer pictures, which cost time
BARE = measurement(3) | {"user": {"share": 0.5}, "response": None}  # of which no picture is drawn
NASTY = "<img src=x onerror=alert(1)>\"'&amp;$\\frac$"  # for HTML, shells and matplotlib


class Page(HTMLParser):
    """Tags with their attributes, texts, and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_run(folder: Path, *measured: dict, **scalars: list[float]) -> Path:
    write_measurements(folder, *measured)
    write_events(folder, {name.replace("__", "/"): values for name, values in scalars.items()})
    return folder


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Figures are made and their pictures stay white: drawing takes most of the time of a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", lambda _, file: Image.new("L", (8, 8), 255).save(file, "PNG"))
        yield


@pytest.fixture(scope="module", params=["undrawn", pytest.param("drawn", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A report of a run of GRPO with a nasty name, a run with one checkpoint, and one that left events only."""
    if request.param == "undrawn":
        request.getfixturevalue("undrawn")
    root = tmp_path_factory.mktemp("runs")
    rl = write_run(
        root / NASTY, measurement(0, **USER), measurement(5, vas=4.0, accuracy=0.625, **USER), reward__total=[1.0, 2.0]
    )
    (rl / "config.yaml").write_text(json.dumps({"model": {"vlm": {"pretrained": NASTY}}, "seed_everything": 3}))
    (rl / "summary.json").write_text(json.dumps({"before": {}, "after": {}, "steps": 5, "seconds": 1.0}))
    (rl / "completions").mkdir()
    answer = {"prompt": 0, "question": NASTY, "answer": "a", "completion": f"<script>x</script>{NASTY}", "total": 0.5}
    (rl / "completions/step_00000001.jsonl").write_text(json.dumps(answer | {"images": ["../a.png"]}) + "\n")
    Image.new("RGB", (8, 8)).save(rl / "completions/a.png")
    one = write_measurements(root / "one", measurement(7, accuracy=None, **USER), image=None)
    write_events(root / "died", {"train/loss": []})
    runs = [str(folder) for folder in (rl, one / "vas", root / "died")]
    output = root / "out/report"
    assert main(["report", *runs, "--output", str(output), "--overlays", "1", "--title", f"T {NASTY}"]) == 0
    return output, Page(output / "index.html")


def test_every_picture_is_in_the_page_and_beside_it(made: tuple[Path, Page]) -> None:
    folder, page = made
    inside = [base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) for image in page.of("img")]
    beside = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(inside) == sorted(beside.values())
    expected = {"all_vas_by_step", "all_shares_user", "01_vas_by_step", "01_map_user"}
    expected |= {"01_shares_user", "01_training", "01_overlay_0_step_0", "01_overlay_0_step_5", "02_map_user"}
    expected |= {"01_prompt_step_00000001"}
    assert {f"{name}.png" for name in expected} <= set(beside)
    for image in page.of("img"):
        assert len(str(image["alt"])) > 20
        width, height = int(str(image["width"])), int(str(image["height"]))
        assert width > 0 < height
    for name in beside:
        assert f"({Path(name).stem}.png)" in page.text


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(made: tuple[Path, Page]) -> None:
    folder, page = made
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    attributes = [(name, value) for _, of in page.tags for name, value in of.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    for name, value in attributes:
        if name in ("src", "href"):
            assert re.match(r"data:image/png;base64,|#section-\d+$", str(value))
    assert not re.search(r"url\(|@import", (folder / "index.html").read_text())


def test_what_files_say_is_text(made: tuple[Path, Page]) -> None:
    _, page = made
    assert f"T {NASTY}" in page.text
    assert f"<script>x</script>{NASTY}" in page.text, "a completion"
    assert f"“{NASTY}”" in page.text, "a question"
    assert page.text.count(NASTY) >= 5, "the run's name, its model, and the command too"


def test_the_page_tells_command_figures_and_what_is_missing(made: tuple[Path, Page]) -> None:
    folder, page = made
    assert f"--output {folder}" in page.text
    for figure in ("50.0 → 62.5", "2.0 → 4.0", "4.0 → 8.0"):
        assert figure in page.text
    for missing in (
        "There is one measurement only, step 7",
        "vas/ holds no step_*.json",
        "There is no summary",
    ):
        assert missing in page.text
    assert "2 checkpoints have VAS and val/accuracy; a scatter needs at least 3" in page.text
    assert "There is no image vas/overlay_0.png" in page.text
    contents = [link["href"] for link in page.of("a")]
    assert contents == [f"#section-{number}" for number in range(1, 5)]
    assert {f"#{section['id']}" for section in page.of("section")} == set(contents)


def test_the_path_of_the_page_is_printed(tmp_path: Path, capsys: Any) -> None:
    run = write_measurements(tmp_path / "run", BARE)
    output = tmp_path / "report"
    assert main(["report", str(run / "vas/step_00000003.json"), "--output", str(output), "--overlays", "0"]) == 0
    assert capsys.readouterr().out == f"{output}/index.html\n"
    assert "Contents" not in Page(output / "index.html").text, "there is one section"


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (["nowhere"], "'nowhere' does not exist, expected the folder of a run"),
        (["."], "'.' is no run, expected the folder of a run (with vas/, summary.json"),
        (["file.txt"], "'file.txt' is no measurement of VASCallback"),
    ],
)
def test_what_is_no_run_is_one_sentence(
    runs: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("hello")
    assert main(["report", *runs, "--output", "out"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {sentence}")
    assert len(said.err.splitlines()) == 1
    assert not Path("out").exists()


def test_runs_beyond_each_have_no_section_and_the_page_says_so(tmp_path: Path, undrawn: None) -> None:
    runs = [str(write_measurements(tmp_path / str(number), BARE) / "vas") for number in range(3)]
    for each, sections in (("2", 3), ("0", 1)):
        output = tmp_path / f"report_{each}"
        assert main(["report", *runs, "--output", str(output), "--each", each]) == 0
        page = Page(output / "index.html")
        assert len(page.of("section")) == sections, "all runs, and each"
        assert f"{each} of 3 runs have a section of their own; --each 3 gives one to all." in page.text
        assert all(f"{tmp_path.name}/{number}" in page.text for number in range(3)), "in the table"
    assert main(["report", runs[0], "--output", str(tmp_path / "none"), "--each", "0"]) == 0
    assert len(Page(tmp_path / "none/index.html").of("section")) == 1, "a page without sections would say nothing"


def test_a_report_is_replaced_if_asked_for(tmp_path: Path, capsys: Any) -> None:
    run = write_measurements(tmp_path / "run", BARE)
    command = ["report", str(run / "vas"), "--output", str(tmp_path / "report")]
    assert main(command) == 0
    assert main(command) == 1
    assert "report' exists; pass --overwrite to replace it." in capsys.readouterr().err
    assert main([*command, "--overwrite", "--title", "second"]) == 0
    assert "<title>second</title>" in (tmp_path / "report/index.html").read_text()


def test_a_base_that_several_runs_started_from_is_one_checkpoint(tmp_path: Path, undrawn: None) -> None:
    runs = []
    for number in range(4):
        ends = measurement(0, **USER), measurement(9, vas=3.0 + number, accuracy=0.1 * number, **USER)
        runs.append(open_run(write_measurements(tmp_path / str(number), *ends)))
    name_runs(runs)
    part = accuracy_part(runs, "val/accuracy")
    assert [picture.name for picture in part.pictures] == [
        f"relation_user_{name}" for name in ("mean_of_ratios", "ratio_of_means", "share")
    ]
    caption = part.pictures[0].caption
    assert caption.startswith("5 checkpoints of 4 runs")
    assert caption.endswith("Of the last checkpoint of each run alone: Spearman ρ = 1.00, n = 4.")


def test_runs_get_short_names_and_groups_when_there_are_many() -> None:
    few = [Run(Path(path), path) for path in ("/r/a/version_0", "/r/b/version_0", "/r/c/x/a/version_0")]
    name_runs(few)
    assert [run.name for run in few] == ["r/a/version_0", "b/version_0", "x/a/version_0"]
    assert [run.group for run in few] == [run.name for run in few]
    many = [Run(Path(f"/runs/{name}/seed_{seed}/vas"), "") for name in ("plain", "share") for seed in range(4)]
    name_runs(many)
    assert {run.group for run in many} == {"plain", "share"}
    assert many[0].name == "plain/seed_0"
    twice = [Run(Path(path), path) for path in ("/r/a/b", "/r/a/b/vas")]
    name_runs(twice)
    assert [run.name for run in twice] == ["r/a/b (1)", "r/a/b (2)"]


@pytest.mark.slow
def test_a_report_of_what_the_callback_wrote_in_somebody_elses_module(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    from avar_lightning.callbacks import VASCallback
    from tests.callbacks.test_vas_callback import Foreign, loader, trainer_in

    logger = TensorBoardLogger(tmp_path, name="run")
    trainer_in(tmp_path, VASCallback(), logger=logger, log_every_n_steps=1).fit(Foreign(), loader(), loader())
    assert main(["report", logger.log_dir, "--output", str(tmp_path / "report"), "--accuracy", "val/own"]) == 0
    names = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert {"01_vas_by_step", "01_map_user", "01_map_response", "01_shares_user", "01_overlay_0_step_0"} <= names
    page = Page(tmp_path / "report/index.html")
    assert "2 checkpoints have VAS and val/own" in page.text
    assert "hold nothing" not in page.text
