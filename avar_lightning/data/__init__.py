"""Chat samples with images: WebDataset shards in, batches out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avar_lightning.data.collate import Collator, Encoded, SampleEncoder, TooLong
    from avar_lightning.data.datamodule import ShardDataModule
    from avar_lightning.data.demo_datamodule import DemoDataModule
    from avar_lightning.data.loader import ShardLoader, TooManyBadSamples
    from avar_lightning.data.order import read_shard
    from avar_lightning.data.reader import ShardReader
    from avar_lightning.data.sample import Sample, SampleError, check_messages, parse_sample
    from avar_lightning.data.shards import Shard, ShardWriter, expand_urls, find_shards, write_shards

__all__ = [
    "Collator",
    "DemoDataModule",
    "Encoded",
    "Sample",
    "SampleEncoder",
    "SampleError",
    "Shard",
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

_HOME = {
    "sample": ("Sample", "SampleError", "check_messages", "parse_sample"),
    "shards": ("Shard", "ShardWriter", "expand_urls", "find_shards", "write_shards"),
    "collate": ("Collator", "Encoded", "SampleEncoder", "TooLong"),
    "order": ("read_shard",),
    "reader": ("ShardReader",),
    "loader": ("ShardLoader", "TooManyBadSamples"),
    "datamodule": ("ShardDataModule",),
    "demo_datamodule": ("DemoDataModule",),
}


def __getattr__(name: str) -> Any:
    """Import on first use: reading a shard should not cost an import of Lightning and transformers."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
