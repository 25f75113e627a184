"""Files of every benchmark through `avar convert --benchmark`, read back with webdataset's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avar_lightning.benchmarks import BENCHMARKS
from avar_lightning.benchmarks.drafting import place_images
from avar_lightning.commands import main
from avar_lightning.conversion.rejecting import BadRecord
from avar_lightning.conversion.workfolder import WorkFolder
from tests.benchmarks.schemas import (
    COLOURS,
    FILES,
    hallusionbench,
    mathvista,
    mmmu,
    mmmu_pro,
    mmstar,
    picture,
    write_benchmark,
    write_parquet,
)
from tests.conversion.conftest import read, shown

EXPECTED = {"mathvista": 4, "mathvision": 3, "mathverse_vo": 2, "mmmu": 3, "mmmu_pro": 2, "mmmu_pro_vision": 1,
            "mmstar": 2, "hallusionbench": 4}  # fmt: skip


CATEGORIES = {
    "mathvista": {"question_type", "answer_type", "task", "category", "grade", "skills", "context", "language",
                  "dataset"},
    "mathvision": {"subject", "level", "question_type"},
    "mathverse_vo": {"subject", "subfield", "question_type", "dataset"},
    "mmmu": {"subject", "topic_difficulty", "img_type", "question_type"},
    "mmmu_pro": {"subject", "topic_difficulty", "img_type"},
    "mmmu_pro_vision": {"subject"},
    "mmstar": {"category", "l2_category"},
    "hallusionbench": {"category", "subcategory", "visual_input", "figure"},
}  # fmt: skip


def run(src: Any, dst: Path, name: str, *options: str) -> int:
    return main(["convert", str(src), str(dst), "--benchmark", name, "--workers", "1", *options])


def converted(tmp_path: Path, name: str, *options: str) -> list[dict[str, Any]]:
    assert run(write_benchmark(tmp_path / "hub", name), tmp_path / "out", name, *options) == 0
    return read(tmp_path / "out")


def text_of(sample: dict[str, Any]) -> str:
    """The user turn, images as 〈i〉."""
    parts = sample["json"]["messages"][-1]["content"]
    return "".join(part["text"] if part["type"] == "text" else "〈i〉" for part in parts)


def colours(sample: dict[str, Any]) -> list[int]:
    by_colour = {colour: number for number, colour in COLOURS.items()}
    return [by_colour[image.getpixel((0, 0))] for image in shown(sample)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_converts_its_reported_split(name: str, tmp_path: Path) -> None:
    samples = converted(tmp_path, name)
    assert len(samples) == EXPECTED[name]
    assert set(BENCHMARKS[name].categories) == CATEGORIES[name]
    for sample in samples:
        columns = sample["json"]
        assert (columns["benchmark"], columns["source"]) == (name, BENCHMARKS[name].hub)
        assert columns["answer"]
        assert columns["question"]
        missing = {category for category in CATEGORIES[name] if columns.get(category) in (None, "")}
        assert missing <= ({"img_type"} if columns["id"] == "validation_Art_3" else set())  # "[]" in its record
        assert "other" not in columns["id"]
    assert len({sample["json"]["id"] for sample in samples}) == len(samples)
    assert main(["convert", str(tmp_path / "out"), "--validate", "--workers", "1"]) == 0


def test_mathvista(tmp_path: Path) -> None:
    integer, choice, real, listed = converted(tmp_path, "mathvista")
    assert text_of(integer) == (
        "〈i〉Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, "
        "at the end.\nQuestion: What is the length of AB? (Unit: cm)"
    )
    assert text_of(choice) == (
        "〈i〉Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: What is the length of AB?\nChoices:\n(A) 18\n(B) 24°"
    )
    assert "a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3" in text_of(real)
    assert "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3]" in text_of(listed)
    columns = choice["json"]
    assert columns["options"] == {"A": "18", "B": "24°"}
    assert (columns["answer"], columns["id"]) == ("24°", "2")
    assert real["json"]["precision"] == 1
    assert columns["skills"] == ["geometry reasoning", "algebraic reasoning"]
    assert (columns["task"], columns["dataset"]) == ("geometry problem solving", "GeoQA+")


def test_mathvision(tmp_path: Path) -> None:
    opened, drawn, written = converted(tmp_path, "mathvision")
    head = (
        '〈i〉Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
        'question, only one letter is allowed in the "\\boxed{}".\nHow large is the angle in <image1>?'
    )
    assert text_of(opened) == text_of(drawn) == head
    assert text_of(written) == head + "\n(A) 1\n(B) $\\frac{1}{2}$\n(C) 3\n(D) 4\n(E) 5"
    assert (written["json"]["level"], opened["json"]["options"]) == ("2", {})


def test_mathverse_keeps_vision_only_and_counts_the_rest(tmp_path: Path, capsys: Any) -> None:
    choice, free = converted(tmp_path, "mathverse_vo")
    assert "1 left out, which belong to another version or split" in capsys.readouterr().out
    assert text_of(choice).startswith(
        "〈i〉According to the question shown in the image, please first conduct reasoning"
    )
    assert choice["json"]["options"] == {"A": "40°", "B": "50°", "C": "60°", "D": "140°"}
    assert (free["json"]["answer"], free["json"]["options"], free["json"]["subfield"]) == ("14 cm", {}, "Angle")
    assert not (tmp_path / "out" / "rejected.jsonl").read_text()


def test_mmmu_images_stand_where_question_and_options_mark_them(tmp_path: Path) -> None:
    one, several, opened = converted(tmp_path, "mmmu")
    closing = "Answer with the option's letter from the given choices directly."
    assert text_of(one) == f"〈i〉 Which one is it?\n(A) $6\n(B) $7\n(C) $8\n\n{closing}"
    assert text_of(several) == f"Compare 〈i〉 with 〈i〉, and 〈i〉 again.\n(A) 〈i〉\n(B) 〈i〉\n\n{closing}"
    assert colours(several) == [2, 1, 2, 3, 1]  # the fourth belongs to the explanation
    assert text_of(opened) == "〈i〉 Which one is it?\nAnswer the question using a single word or phrase."
    assert opened["json"]["answer"] == ["8.4", "eight"]
    assert (one["json"]["subject"], one["json"]["img_type"]) == ("Accounting", ["Tables"])
    assert [sample["json"]["subject"] for sample in (several, opened)] == ["Accounting", "Art"]


def test_mmmu_pro(tmp_path: Path) -> None:
    form = (
        "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where "
        "LETTER is one of options. Think step by step before answering."
    )
    standard, _ = converted(tmp_path / "a", "mmmu_pro")
    assert text_of(standard).startswith("〈i〉 Which one is it?\nA. option 0\nB. option 1\n")
    assert text_of(standard).endswith(f"J. option 9\nAnswer the preceding multiple choice question. {form}")
    (vision,) = converted(tmp_path / "b", "mmmu_pro_vision")
    assert text_of(vision) == f"〈i〉Write out the multiple-choice question in the image and then solve it. {form}"
    assert (colours(vision), vision["json"]["options"]["J"], vision["json"]["subject"]) == ([2], "option 9", "History")


def test_mmstar_reads_structs_and_bytes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub" / "mmstar.parquet", [mmstar(), mmstar(index=1)])
    assert run(tmp_path / "hub", tmp_path / "structs", "mmstar") == 0
    for sample in (*converted(tmp_path / "bytes", "mmstar"), *read(tmp_path / "structs")):
        assert colours(sample) == [1]
        assert text_of(sample) == (
            "〈i〉Question: What is on it?\nOptions: A: a cat, B: a dog on a mat., C: a book, D: nothing\n"
            "Please select the correct answer from the options above."
        )
        assert sample["json"]["options"]["B"] == "a dog on a mat."


def test_hallusionbench_includes_questions_without_a_figure(tmp_path: Path) -> None:
    samples = converted(tmp_path, "hallusionbench", "--system", "Look first.")
    assert [len(shown(sample)) for sample in samples] == [1, 1, 1, 0]
    assert [sample["json"]["answer"] for sample in samples] == ["yes", "no", "no", "yes"]
    assert [sample["json"]["figure"] for sample in samples] == ["with"] * 3 + ["without"]
    assert samples[-1]["json"]["messages"] == [
        {"role": "system", "content": "Look first."},
        {"role": "user", "content": [{"type": "text", "text": "Is the right circle as large as the left one? Please "
                                                              "answer yes or no."}]},
    ]  # fmt: skip
    assert samples[2]["json"]["id"] == "VS_chart_0_1_0"


def test_bad_records_are_rejected_with_the_reason(tmp_path: Path, capsys: Any) -> None:
    records = [
        mmmu(),
        mmmu(id="validation_Art_1", question="<image 2>?"),
        mmmu(id="validation_Art_2", options="['a', "),
        mmmu(id="validation_Art_3", image_1={"bytes": b"no image", "path": None}),
        mmmu(id="test_Art_4", answer="?"),
    ]
    file = write_parquet(tmp_path / "one.parquet", records)
    assert run(file, tmp_path / "out", "mmmu", "--max-rejected", "0.8") == 0
    said = capsys.readouterr().out
    assert "5 records (mmmu): 1 samples" in said
    assert "1 left out" in said
    assert "mmmu has 900 questions; results on these 1 are not those of the benchmark" in said
    reasons = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [reason["kind"] for reason in reasons] == ["missing image", "bad options", "unreadable image"]
    assert reasons[0]["reason"] == "the text shows <image 2>, but image_2 is empty"
    assert [reason["id"] for reason in reasons] == ["validation_Art_1", "validation_Art_2", "validation_Art_3"]


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("mathvista", mathvista(answer_type="float", precision=3.0), "precision 3, with 0 choices; expected choices"),
        ("hallusionbench", hallusionbench(gt_answer="2"), "gt_answer is '2'; expected 0 for no or 1 for yes"),
        ("mmstar", {**mmstar(), "answer": ""}, "has no right answer; expected the labelled split"),
        ("mmstar", hallusionbench(), "the record has no 'index' but ["),
    ],
)
def test_other_records_are_refused(name: str, record: dict[str, Any], reason: str, tmp_path: Path, capsys: Any) -> None:
    assert run(write_parquet(tmp_path / "x.parquet", [record]), tmp_path / "out", name) == 1
    assert reason in capsys.readouterr().err


def test_what_cannot_be_found(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def error(src: Any, name: str = "hallusionbench") -> str:
        assert run(src, tmp_path / "out", name) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return str(said)

    folder = write_benchmark(tmp_path / "hub", "hallusionbench")
    assert "holds none of the files of MMStar; expected mmstar.parquet as in https://hugging" in error(folder, "mmstar")
    (folder / "data" / "non_image-00000-of-00001.parquet").unlink()
    assert "but no data/non_image-*.parquet; fetch all of lmms-lab/HallusionBench" in error(folder)
    assert "no such file or folder: /nowhere/at/all; expected the files of lmms-lab" in error("/nowhere/at/all")
    (tmp_path / "x.csv").write_text("a")
    assert "is no .parquet file" in error(tmp_path / "x.csv")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = error("lmms-lab/HallusionBench")
    assert "there is no folder lmms-lab/HallusionBench, and lmms-lab/HallusionBench could not be fetched from" in said
    assert "or name a folder with the files of lmms-lab/HallusionBench" in said


def test_a_hub_name_fetches_only_the_reported_split(tmp_path: Path, monkeypatch: Any) -> None:
    asked = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(write_benchmark(tmp_path / "cache", "mmmu_pro"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert run("MMMU/MMMU_Pro", tmp_path / "out", "mmmu_pro") == 0
    assert asked == {"name": "MMMU/MMMU_Pro", "repo_type": "dataset",
                     "allow_patterns": ["standard (10 options)/test-*.parquet"]}  # fmt: skip
    assert len(read(tmp_path / "out")) == 2


def test_four_options_are_not_taken_for_ten(tmp_path: Path, capsys: Any) -> None:
    records = [mmmu_pro(id=f"test_Art_{number}", options="['a', 'b', 'c', 'd']", answer="B") for number in range(3)]
    write_parquet(tmp_path / "flat" / "test-00000-of-00002.parquet", records)
    for src in (tmp_path / "flat", tmp_path / "flat" / "test-00000-of-00002.parquet"):
        assert run(src, tmp_path / "out", "mmmu_pro") == 1
        said = capsys.readouterr().err
        assert "is not of MMMU-Pro (10 options): its questions have 4 options at most, as of standard (4 opt" in said
    write_parquet(tmp_path / "ten.parquet", [*records, mmmu_pro()])  # a question may have fewer
    assert run(tmp_path / "ten.parquet", tmp_path / "out", "mmmu_pro") == 0


def test_the_manifest_says_which_commit_of_the_hub(tmp_path: Path) -> None:
    commits = ["0123456789" * 4, "abcdef0123" * 4]

    def manifest(src: Path, dst: str) -> dict[str, Any]:
        assert run(src, tmp_path / dst, "hallusionbench") == 0
        assert main(["convert", str(tmp_path / dst), "--validate", "--workers", "1"]) == 0
        return {key: value for key, value in json.loads((tmp_path / dst / "manifest.json").read_text()).items()
                if key != "shards"}  # fmt: skip

    known = {"hub": "lmms-lab/HallusionBench", "samples": 4}
    cached = write_benchmark(tmp_path / "snapshots" / commits[0], "hallusionbench")
    assert manifest(cached, "a") == known | {"commit": commits[0]}
    local = write_benchmark(tmp_path / "local", "hallusionbench")
    assert manifest(local, "b") == known
    said = local / ".cache/huggingface/download"  # as hf download --local-dir leaves it
    for path, commit in zip(FILES["hallusionbench"], (commits[1], commits[1]), strict=True):
        (said / f"{path}.metadata").parent.mkdir(parents=True, exist_ok=True)
        (said / f"{path}.metadata").write_text(f"{commit}\netag\n1.0\n")
    assert manifest(local, "c") == known | {"commit": commits[1]}
    (said / f"{path}.metadata").write_text(f"{commits[0]}\netag\n1.0\n")
    assert manifest(local, "d") == known  # files of two commits


@pytest.mark.parametrize(
    "options", [["--benchmark", "mmstar"], ["--limit", "3"], ["--overwrite"], ["--column", "id=x"]]
)
def test_options_that_checking_would_ignore_are_refused(options: list[str], tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(tmp_path), "--validate", *options])
    assert f"{options[0]} does not go with --validate" in capsys.readouterr().err


def test_files_may_lie_side_by_side(tmp_path: Path) -> None:
    for path, records in FILES["hallusionbench"].items():
        write_parquet(tmp_path / "flat" / Path(path).name, records)
    assert run(tmp_path / "flat", tmp_path / "out", "hallusionbench", "--limit", "3") == 0
    assert len(read(tmp_path / "out")) == 3


@pytest.mark.parametrize("options", [["--format", "columns"], ["--column", "id=x"], ["--split", "a"], ["--drop", "x"],
                                     ["--prepend-images"]])  # fmt: skip
def test_options_that_say_what_the_adapter_knows_are_refused(options: list[str], tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, tmp_path / "out", "mmstar", *options)
    assert f"{options[0]} does not go with --benchmark" in capsys.readouterr().err


def test_nothing_of_the_benchmark(tmp_path: Path, capsys: Any) -> None:
    file = write_parquet(tmp_path / "x.parquet", [mmmu(id="dev_Art_1")])
    assert run(file, tmp_path / "out", "mmmu") == 1
    assert "holds 1 record(s), but none of those asked for" in capsys.readouterr().err


def test_an_interrupted_conversion_knows_what_it_left_out(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    folder = write_benchmark(tmp_path / "hub", "mathverse_vo")
    remove = WorkFolder.remove
    for place in ("publish", "remove"):  # before the shards are moved, and after
        with monkeypatch.context() as patched:
            patched.setattr(WorkFolder, place, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run(folder, tmp_path / place, "mathverse_vo") == 130
        assert WorkFolder.remove is remove
        assert run(folder, tmp_path / place, "mathverse_vo") == 0
        said = capsys.readouterr().out
        assert said.startswith("3 records (mathverse_vo): 2 samples")
        assert "1 left out" in said


@pytest.mark.slow
def test_several_processes_leave_out_the_same(tmp_path: Path, capsys: Any) -> None:
    folder = write_benchmark(tmp_path / "hub", "mathverse_vo")
    out = ["--samples-per-shard", "1"]
    assert run(folder, tmp_path / "one", "mathverse_vo", *out) == 0
    assert (
        main(["convert", str(folder), str(tmp_path / "two"), "--benchmark", "mathverse_vo", "--workers", "2", *out])
        == 0
    )
    assert "1 left out" in capsys.readouterr().out
    assert [path.read_bytes() for path in sorted((tmp_path / "one").glob("*.tar"))] == [
        path.read_bytes() for path in sorted((tmp_path / "two").glob("*.tar"))
    ]


def test_images_without_any_marker_stand_before_the_text() -> None:
    parts, references = place_images("Which?", {1: picture(1), 2: None, 3: picture(3)})
    assert [part["type"] for part in parts] == ["image", "image", "text"]
    assert references == [picture(1), picture(3)]
    with pytest.raises(BadRecord, match="image_2 is empty"):
        place_images("<image 2>", {1: picture(1), 2: None})
