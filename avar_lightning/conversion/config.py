"""What a conversion is asked for, checked before anything is read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

# Where a field is looked for when `columns` does not say so: the first of these names that the record fills.
FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "history": ("history",),
    "question": ("question", "problem", "prompt", "query", "instruction"),
    "options": ("options", "choices"),
    "response": ("response", "output", "completion", "rationale", "reasoning"),
    "answer": ("answer", "solution", "label"),
    "images": ("images", "image", "file_name", "file_names"),
    "system": ("system",),
    "id": ("id",),
    "source": ("source",),
}


@dataclass(frozen=True)
class ConvertConfig:
    """A data set in another format, and the folder of shards that is made of it."""

    src: str | Path
    """A .json, .jsonl or .parquet file, or a folder: of one of them, of `datasets.save_to_disk`, or of images with a
    metadata.jsonl or metadata.csv."""
    dst: str | Path
    """The folder of the shards."""
    format: str = "auto"
    """sharegpt, messages, alpaca or columns; auto tells by the names of the first records' fields."""
    images: str | Path | None = None
    """The folder that paths of images begin at; default: the folder of the file that names them."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the input's own fields by ours, as {"question": "problem"}; `images` may be called `image`."""
    drop: tuple[str, ...] = ()
    """Fields of the input that are left out."""
    split: str | None = None
    """The split, where the input has several."""
    system: str | None = None
    """A system prompt for the samples that have none."""
    source: str | None = None
    """The name of the data set, for the samples that do not say theirs."""
    prepend_images: bool = False
    """Show the images before the first question where the text has no <image>."""
    samples_per_shard: int = 1000
    """Records of the input that make a shard."""
    workers: int | None = None
    """Processes; default: one for each core that this process may use, 16 at most."""
    max_rejected: float = 0.05
    """Largest share of records that may be rejected."""
    overwrite: bool = False
    """Replace the shards that dst holds, and another conversion that was left unfinished there."""
    limit: int | None = None
    """Only so many records, from the first."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; expected at least 1")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; expected at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; expected at least 1")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"max_rejected is {self.max_rejected}; expected a share from 0 to 1")
        unknown = [name for name in self.columns if name not in FIELD_NAMES and name != "image"]
        if unknown:
            raise ValueError(f"columns maps {unknown[0]!r}; expected one of {', '.join(FIELD_NAMES)}")
        if self.images is not None and not Path(self.images).is_dir():
            raise FileNotFoundError(f"images is {str(self.images)!r}; expected an existing folder")

    @property
    def num_workers(self) -> int:
        """Number of processes."""
        mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or min(mine, 16)

    def names(self, ours: str) -> tuple[str, ...]:
        """Names under which a record may hold our field, the first that it fills counts."""
        given = self.columns.get(ours) or (self.columns.get("image") if ours == "images" else None)
        return (given,) if given else FIELD_NAMES[ours]
