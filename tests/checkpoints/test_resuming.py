"""A run that goes on from any checkpoint, on any hardware, is the run that was never stopped."""

import json
from collections import Counter

import pytest
import torch

from avar_lightning.checkpoints import look_into
from tests.checkpoints.running import book, run

pytestmark = pytest.mark.timeout(900)  # each starts many processes, and many are slow on a busy machine
SAMPLES = 48
PLACES = {
    "one": (1, []),
    "ddp": (2, ["--batch-size", 2]),
    "sharded": (2, ["--batch-size", 2, "--sharded"]),
    "sharded alone": (1, ["--sharded"]),
    "one file": (2, ["--batch-size", 2, "--sharded", "--one-file"]),
}


def said(options):
    return " ".join(map(str, options)) or "full"


def exact(write, tmp_path, options, points, samples=SAMPLES):
    """Resume from checkpoints at some of the points, and compare with the run that went through, bit for bit."""
    shards = write(samples)
    run(shards, tmp_path / "whole", *options)
    whole = book(tmp_path / "whole")
    for point in points:
        folder = tmp_path / f"from {point}"
        run(shards, folder, *options, "--resume", tmp_path / "whole" / f"step={point}.ckpt")
        cut = book(folder)
        assert 0 < len(cut) < len(whole)
        assert len({entry["loss"] for entry in cut}) > len(cut) / 2  # it learns
        assert cut == whole[-len(cut) :], f"from step {point}"


def test_epochs_resume_in_their_middle(write, tmp_path):
    """Limited by epochs, Lightning itself forgets the position in the data; adapters drop out at random."""
    exact(write, tmp_path, ["--lora", "--max-epochs", 2], (2,), samples=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "points"),
    [
        (["--lora", "--max-epochs", 2], (2, 10, 12, 14, 22)),
        (["--lora", "--max-steps", 18], (2, 10, 12, 14)),
        (["--kind", "grpo", "--lora", "--max-epochs", 1], (2, 10, 22)),
        (["--kind", "grpo", "--max-steps", 18], (6, 16)),
        (["--accumulate", 3, "--max-epochs", 2], (2, 4, 6)),
        # Validation comes between two updates: the checkpoint waits for the second.
        (["--accumulate", 3, "--val-every", 4, "--lora", "--max-epochs", 2], (2, 3, 6)),
        (["--val-every", 5, "--lora", "--max-steps", 18], (5, 10, 15)),
    ],
    ids=said,
)
def test_every_resumed_run_is_the_whole_one(write, tmp_path, options, points):
    exact(write, tmp_path, options, points)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ([], {"one": "ddp, sharded", "ddp": "one", "sharded": "one, ddp, sharded alone", "one file": "one, sharded"}),
        (["--lora", "--dropout", 0], {"ddp": "sharded", "sharded": "one", "sharded alone": "one file"}),
        (["--kind", "grpo"], {"one": "sharded", "sharded": "ddp, sharded"}),
    ],
    ids=said,
)
def test_checkpoints_of_every_kind_open_in_every_place(write, tmp_path, options, moves):
    """The same samples, rates and losses (sums over two processes round otherwise); rollouts are drawn by rank."""
    shards, point = write(SAMPLES), 12 if "grpo" in options else 6
    common = [*options, "--max-epochs", 1]
    for source, places in moves.items():
        processes, own = PLACES[source]
        run(shards, tmp_path / source, *common, *own, processes=processes)
        whole = book(tmp_path / source, processes)
        for place in places.split(", "):
            resumed, own = PLACES[place]
            saved, folder = tmp_path / source / f"step={point}.ckpt", tmp_path / f"{source} to {place}"
            run(shards, folder, *common, *own, "--resume", saved, processes=resumed)
            cut = book(folder, resumed)
            assert len(cut) == 6
            for name in ("step", "lr", "samples"):
                assert [entry[name] for entry in cut] == [entry[name] for entry in whole[-6:]], (source, place, name)
            if "grpo" not in options or processes == resumed:
                losses = [torch.tensor([entry["loss"] for entry in each]) for each in (cut, whole[-6:])]
                torch.testing.assert_close(*losses, rtol=1e-5, atol=2e-6, msg=f"{source} to {place}")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [["--max-epochs", 2], ["--max-steps", 60]], ids=said)
def test_another_number_of_samples_an_update_sees_every_sample_once(write, tmp_path, limit):
    """Batches of 4, then of 8 and 2; in the first epoch's middle, and at its end."""
    shards = write(SAMPLES)
    run(shards, tmp_path / "whole", *limit)
    whole = book(tmp_path / "whole")
    for point in (6, 12):
        for size in (8, 2):
            folder = tmp_path / f"from {point} by {size}"
            saved = tmp_path / "whole" / f"step={point}.ckpt"
            run(shards, folder, *limit, "--batch-size", size, "--resume", saved)
            cut = book(folder)
            seen = [sample for entry in [*whole[:point], *cut] for sample in entry["samples"]]
            assert Counter(seen[:SAMPLES]) == Counter(range(SAMPLES))
            assert Counter(seen[SAMPLES : 2 * SAMPLES]) == Counter(range(SAMPLES))
            if "--max-epochs" in limit:
                assert len(seen) == 2 * SAMPLES
                rates = {len([s for e in whole[: i + 1] for s in e["samples"]]): e["lr"] for i, e in enumerate(whole)}
                done = point * 4
                for entry in cut[:-1]:  # the same rate after the same number of samples
                    done += size
                    if done in rates:
                        assert entry["lr"] == pytest.approx(rates[done], abs=1e-4)  # warm-up rounds to updates


@pytest.mark.slow
def test_what_modules_watch_goes_on(write, tmp_path):
    shards = write(16)
    run(shards, tmp_path / "whole", "--max-steps", 8)
    run(shards, tmp_path / "cut", "--max-steps", 8, "--resume", tmp_path / "whole" / "step=4.ckpt")
    ends = [look_into(tmp_path / name / "last.ckpt").extra["watched"] for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    assert ends[0]["gaming"]["steps"] == 8


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(write, tmp_path):
    shards = write(16)
    run(shards, tmp_path / "full", "--max-steps", 2)
    saved = tmp_path / "full" / "step=2.ckpt"
    for options in (["--lora"], ["--sharded", "--lora"]):
        says = tmp_path / f"says{len(options)}.json"
        run(shards, tmp_path / "other", *options, "--max-steps", 4, "--resume", saved, "--says", says, ends=1)
        kind, sentence = json.loads(says.read_text())
        assert kind == "ValueError"
        assert "is a checkpoint of another model" in sentence
        assert "unexpected" in sentence
        assert "missing" in sentence
