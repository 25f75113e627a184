"""TensorBoard's event files: every scalar.

Their records are framed as in TensorFlow's TFRecord files: length, checksum, message, checksum. The messages are
tensorboard's own; its reader is not used, because it computes checksums in Python, one megabyte a second.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

_HEAD, _CHECKSUM = struct.Struct("<Q4x"), 4


@dataclass
class Events:
    """What the event files of a run hold.

    Attributes:
        scalars: By tag, the value at each step, in the order of the steps; where a resumed run logged a step again,
            the later one.
        problems: What could not be read, a sentence each.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def event_files(folder: Path) -> list[Path]:
    """The event files of a run, the oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"))


def read_events(folder: Path) -> Events:
    """Read all event files of a run; one that breaks off counts as far as it goes."""
    events = Events()
    for path in event_files(folder):
        try:
            for record in _records(path):
                event = Event.FromString(record)
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        events.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
        except Exception as error:  # protobuf raises its own, and is no dependency of ours
            events.problems.append(f"{path.name} is read up to where it breaks off ({type(error).__name__}: {error}).")
    events.scalars = {tag: dict(sorted(values.items())) for tag, values in events.scalars.items()}
    return events


def _records(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        while head := file.read(_HEAD.size):
            if len(head) < _HEAD.size:
                raise EOFError("a record has no length")
            (length,) = _HEAD.unpack(head)
            # Before it is read: a damaged length may ask for all memory.
            if file.tell() + length + _CHECKSUM > size:
                raise EOFError(f"a record of {length} bytes is cut off")
            yield file.read(length)
            file.seek(_CHECKSUM, 1)
