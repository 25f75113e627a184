"""A benchmark's files into shards, with everything in the samples that its scorer needs."""

from __future__ import annotations

from avar_lightning.benchmarks.fetching import find_records, hub_commit
from avar_lightning.benchmarks.registry import benchmark_of
from avar_lightning.conversion import ConversionReport, ConvertConfig, Reading, convert


def convert_benchmark(name: str, config: ConvertConfig, *, progress: bool = True) -> ConversionReport:
    """Convert a benchmark's reported split into shards; their manifest says of which dataset and commit of the Hub.

    Args:
        name: Of the benchmark.
        config: Its `src` is a folder with the files that the Hugging Face Hub serves, one of these files, or the name
            of the dataset on the Hub. What names fields, images or splits does not apply.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: There is no such input.
        ValueError: The name is unknown, the files are not the benchmark's, or as of
            :func:`avar_lightning.conversion.convert`.
    """
    benchmark = benchmark_of(name)
    source = find_records(benchmark, config.src)
    commit = hub_commit(source)
    origin = {"hub": benchmark.hub} | ({"commit": commit} if commit else {})
    return convert(config, progress=progress, reading=Reading(source, benchmark.name, benchmark.draft, origin))
