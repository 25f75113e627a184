"""Chat samples with images: WebDataset shards in, batches out."""

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
