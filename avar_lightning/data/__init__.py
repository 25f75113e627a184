"""Chat samples with images: WebDataset shards in, batches out.

Names are imported when they are first used: writing and converting shards needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avar_lightning.data.collate import Collator, Encoded, PromptRows, SampleEncoder, TooLong
    from avar_lightning.data.datamodule import ShardDataModule
    from avar_lightning.data.demo_datamodule import DemoDataModule
    from avar_lightning.data.fetching import ShardCache
    from avar_lightning.data.loader import ShardLoader, TooManyBadSamples
    from avar_lightning.data.reader import ShardReader
    from avar_lightning.data.sample import Sample, SampleError, check_messages, parse_sample
    from avar_lightning.data.shards import Shard, expand_urls, find_shards
    from avar_lightning.data.tars import read_shard
    from avar_lightning.data.writer import ShardWriter, write_shards

_HOMES = {
    "collate": ("Collator", "Encoded", "PromptRows", "SampleEncoder", "TooLong"),
    "datamodule": ("ShardDataModule",),
    "demo_datamodule": ("DemoDataModule",),
    "fetching": ("ShardCache",),
    "loader": ("ShardLoader", "TooManyBadSamples"),
    "reader": ("ShardReader",),
    "sample": ("Sample", "SampleError", "check_messages", "parse_sample"),
    "shards": ("Shard", "expand_urls", "find_shards"),
    "tars": ("read_shard",),
    "writer": ("ShardWriter", "write_shards"),
}

__all__ = [
    "Collator",
    "DemoDataModule",
    "Encoded",
    "PromptRows",
    "Sample",
    "SampleEncoder",
    "SampleError",
    "Shard",
    "ShardCache",
    "ShardDataModule",
    "ShardLoader",
    "ShardReader",
    "ShardWriter",
    "TooLong",
    "TooManyBadSamples",
    "check_messages",
    "expand_urls",
    "find_shards",
    "parse_sample",
    "read_shard",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
