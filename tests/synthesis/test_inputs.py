"""Questions from shards, JSONL and the demo: nothing is lost, nothing outside the folder is read."""

import base64
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from avar_lightning.conversion import images
from avar_lightning.data import Sample, ShardWriter
from avar_lightning.synthesis import synthesize
from avar_lightning.synthesis.inputs import count_items, read_items, with_options
from tests.synthesis.conftest import make_config, rejected, written
from tests.synthesis.server import write_questions


def config_of(path, **options):
    return make_config("http://127.0.0.1:9/v1", path, Path(path).parent / "out", **options)


def problems(tmp_path, *rows):
    write_questions(tmp_path, 2)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return [item.problem for item in read_items(config_of(path))]


def row(**changes):
    return {"question": "Item 1: how many dots?", "image": "pictures/1.png", "answer": 1} | changes


def sample(item, **changes):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Item {item}: how many dots?"}]},
        {"role": "assistant", "content": "An old response."},
    ]
    image = Image.new("RGB", (8, 8), (item, 0, 0))
    fields = {"messages": messages, "images": [image], "answer": item, "id": f"s{item}", "source": "x"}
    return Sample(**(fields | {"columns": {"level": item}} | changes))


def test_shards_keep_their_turns_columns_and_images(server, tmp_path):
    with ShardWriter(tmp_path / "in", samples_per_shard=2) as writer:
        for item in range(3):
            writer.write(sample(item))
    config = make_config(server.url, tmp_path / "in", tmp_path / "out", system_prompt="Not used.")
    assert count_items(config) == 3
    assert synthesize(config).kept == 3
    found = written(config)["s2"]
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]
    assert found.messages[0]["content"] == "Be brief."
    assert "An old response" not in str(found.messages)
    assert (found.source, found.columns["level"], found.answer) == ("x", 2, 2)
    assert found.images[0].tobytes() == sample(2).images[0].tobytes()


def test_samples_of_shards_that_cannot_be_asked_are_rejected(server, tmp_path):
    text = [{"role": "user", "content": "Item 1: how many dots?"}]
    turns = [*sample(1).messages, {"role": "user", "content": "And now?"}]
    with ShardWriter(tmp_path / "in") as writer:
        writer.write(sample(0))
        writer.write(sample(1, messages=text, images=[]))
        writer.write(sample(2, answer=None))
        writer.write(sample(3, messages=turns))
        writer.write(sample(4, answer=""))
    config = make_config(server.url, tmp_path / "in", tmp_path / "out")
    report = synthesize(config)
    assert (report.kept, report.rejected["input"]) == (1, 4)
    reasons = {id: row["reason"] for id, row in rejected(config).items()}
    assert reasons == {
        "s1": "input: it has no image",
        "s2": "input: it has no gold answer",
        "s3": "input: it has several turns; expected one question",
        "s4": "input: it has no gold answer",
    }
    assert len(server.requests) == 3


def test_a_shard_that_is_cut_off_loses_no_sample_silently(server, tmp_path):
    with ShardWriter(tmp_path / "in") as writer:
        for item in range(3):
            writer.write(sample(item))
    shard = tmp_path / "in" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    config = make_config(server.url, tmp_path / "in", tmp_path / "out")
    report = synthesize(config)
    assert report.read == report.kept + report.rejected["input"] == 3
    assert report.rejected["input"] >= 1
    assert any("breaks off" in row["reason"] for row in rejected(config).values())


def test_lines_that_cannot_be_asked_say_why(tmp_path):
    found = problems(
        tmp_path,
        row(),
        b"{nonsense",
        b"\xff\xfe",
        [1, 2],
        row(question=None),
        row(question="  "),
        row(image=None),
        row(image=7),
        row(image="pictures/none.png"),
        row(answer=None),
        row(image="bad.jsonl"),
        row(question="Half \ud83d?"),
        row(note="\ud83d"),
        b"[" * 100_000,
    )
    assert found[0] is None
    expected = ["not JSON", "not JSON", "a JSON object", "question is None", "question is '  '", "it has no image"]
    expected += ["image is 7", "there is no file", "it has no gold answer", "cannot be decoded"]
    expected += ["it holds half of a character", "it holds half of a character", "not JSON"]
    for line, (problem, said) in enumerate(zip(found[1:], expected, strict=True), start=2):
        assert said in problem
        assert f"bad.jsonl:{line}: " in problem or problem.startswith("it h")
        assert "--images" not in problem  # which is an option of `avar convert`


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "pictures/../../secret.png", "link.png"])
def test_no_image_is_read_outside_of_the_folder(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (problem,) = problems(folder, row(image=name))
    assert f"{name!r} leads out of" in problem


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    (problem,) = problems(tmp_path, row())
    assert "decompression bomb" in problem


@pytest.mark.timeout(20)
def test_only_files_of_known_formats_and_sizes_are_opened(tmp_path, monkeypatch):
    write_questions(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "runs.png", "EPS")
    (tmp_path / "large.png").write_bytes(bytes(2000))
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    found = problems(tmp_path, *(row(image=name) for name in ("pipe.png", "runs.png", "large.png", "pictures/1.png")))
    for problem, said in zip(
        found[:3], ["there is no file", "expected one of PNG", "more than 1000 bytes"], strict=True
    ):
        assert said in problem
    assert found[3] is None


def test_a_picture_may_stand_in_the_line(tmp_path):
    write_questions(tmp_path, 2)
    data = base64.b64encode((tmp_path / "pictures" / "1.png").read_bytes()).decode()
    path = tmp_path / "inside.jsonl"
    path.write_text(json.dumps(row(image=f"data:image/png;base64,{data}")) + "\n")
    (item,) = read_items(config_of(path))
    assert (item.problem, item.sample.images[0].getpixel((0, 0))) == (None, (1, 0, 0))


@pytest.mark.parametrize(
    ("question", "options", "shown"),
    [
        ("How many of the 12 cats are grey?", ["1", "2", "12"], "\nA. 1\nB. 2\nC. 12"),
        ("A cat or a dog?", {"A": "cat", "B": "dog", "C": None}, "\nA. cat\nB. dog"),
        ("Which?", ["A. cat", "B. dog"], "\nA. cat\nB. dog"),
        ("Which?\nA. 1\nB. 12", ["1", "2"], "\nA. 1\nB. 2"),
        ("Which?\nA. cat\nB. dog", ["cat", "dog"], ""),
        ("Which?\n(A) cat\n(B) dog", ["cat", "dog"], ""),
        ("Which? A) cat, B) dog", ["A. cat", "B. dog"], ""),
        ("How many?", None, ""),
        ("How many?", "one or two", ""),
    ],
)
def test_options_are_shown_once(question, options, shown):
    assert with_options(question, options) == question + shown


def test_blank_lines_are_no_samples(tmp_path):
    path = write_questions(tmp_path, 2)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert count_items(config_of(path)) == len(list(read_items(config_of(path)))) == 2


def test_several_images_keep_their_order(tmp_path):
    write_questions(tmp_path, 3)
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps(row(image=["pictures/2.png", "pictures/1.png"])) + "\n")
    (item,) = read_items(config_of(path))
    assert [image.getpixel((0, 0))[0] for image in item.sample.images] == [2, 1]
    assert [part["type"] for part in item.sample.messages[0]["content"]] == ["image", "image", "text"]


@pytest.mark.parametrize("name", ["none.jsonl", "none.tar"])
def test_an_input_that_is_not_there_is_said(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"check the path|correct the path"):
        synthesize(config_of(tmp_path / name))


def test_samples_are_read_one_at_a_time(tmp_path, monkeypatch):
    path = write_questions(tmp_path, 50)
    items = read_items(config_of(path))
    assert next(items).id == "q0"
    path.with_name("pictures").rename(tmp_path / "gone")
    assert "there is no file" in next(items).problem
