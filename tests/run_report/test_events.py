"""Event files of torch's writer are read as tensorboard reads them, whole, broken off, or in several pieces."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avar_lightning.run_report.events import read_events
from tests.run_report.written_runs import write_events


def test_scalars_are_those_that_tensorboard_reads(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/loss": [3.0, 2.5, math.nan], "reward/total": [0.1]}, images=2)
    found = read_events(tmp_path)
    oracle = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.scalars) == set(oracle.Tags()["scalars"])
    for tag, values in found.scalars.items():
        expected = [(event.step, event.value) for event in oracle.Scalars(tag)]
        np.testing.assert_equal(list(values.items()), expected)
    assert found.problems == []


def test_a_file_that_breaks_off_counts_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write_events(tmp_path, {"a": [1.0, 2.0], "b": [3.0]})
    path.write_bytes(path.read_bytes()[:-5])
    found = read_events(tmp_path)
    assert found.scalars == {"a": {0: 1.0, 1: 2.0}}
    assert "cut off" in found.problems[0]
    assert path.name in found.problems[0]


@pytest.mark.parametrize("damage", [struct.pack("<Q", 1 << 60) + b"abcd", b"abc", b"\x05" + bytes(11) + b"\xff" * 9])
def test_a_damaged_record_ends_the_reading_with_a_sentence(tmp_path: Path, damage: bytes) -> None:
    path = write_events(tmp_path, {"a": [1.0]})
    path.write_bytes(path.read_bytes() + damage)
    found = read_events(tmp_path)
    assert found.scalars == {"a": {0: 1.0}}
    assert len(found.problems) == 1


def test_of_a_step_that_a_resumed_run_logged_again_the_later_counts(tmp_path: Path) -> None:
    write_events(tmp_path, {"a": [1.0, 2.0, 3.0]}).rename(tmp_path / "events.out.tfevents.1.x")
    write_events(tmp_path / "later", {"a": [1.0, 7.0]}).rename(tmp_path / "events.out.tfevents.2.x")
    assert read_events(tmp_path).scalars == {"a": {0: 1.0, 1: 7.0, 2: 3.0}}


def test_a_folder_without_events_has_none(tmp_path: Path) -> None:
    assert read_events(tmp_path).scalars == {}
