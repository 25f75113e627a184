"""`avar convert`: its options, and what it prints."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from avar_lightning.benchmarks import BENCHMARKS, convert_benchmark
from avar_lightning.conversion import ConvertConfig, convert, validate
from avar_lightning.conversion.config import FIELD_NAMES
from avar_lightning.conversion.formats import FORMATS

# With --benchmark, its own adapter says what these would.
OF_VALIDATE = ("src", "dst", "workers")
NOT_OF_BENCHMARKS = ("format", "images", "columns", "drop", "split", "source", "prepend_images")


def add_convert(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert",
        allow_abbrev=False,  # half an --overwrite must not overwrite
        help="turn another format into shards, or check shards",
        description=(
            "Turn ShareGPT and LLaMA-Factory JSON, messages, Alpaca, and tables (Parquet, datasets folders) into the "
            "shards DST. Records that cannot become samples are listed in DST/rejected.jsonl with file and line. An "
            "interrupted conversion goes on when it is called again. With --benchmark, SRC holds a benchmark's files "
            "as the Hugging Face Hub serves them. With --validate, check the shards SRC instead."
        ),
    )
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="a .json, .jsonl or .parquet file, or a folder: of one of them, of datasets.save_to_disk, or of images "
        "with a metadata.jsonl or metadata.csv; with --validate, shards",
    )
    add("dst", metavar="DST", nargs="?", help="folder of the shards")
    add(
        "--validate",
        action="store_true",
        help="check the shards SRC, and name what is bad: every sample's JSON, turns and images, no key twice, and "
        "sizes and checksums by the manifest; not whether a model's chat template or context takes the sample",
    )
    add(
        "--benchmark",
        choices=list(BENCHMARKS),
        metavar="NAME",
        help="the questions of a benchmark with all that scores answers to them; SRC is a folder with the files that "
        "the Hugging Face Hub serves, one of them, or the dataset's name there; NAME is one of "
        f"{', '.join(BENCHMARKS)}",
    )
    formats = ["auto", *FORMATS]
    add("--format", default="auto", choices=formats, help="default: told by the names of the first records' fields")
    add("--images", metavar="FOLDER", help="where paths of images begin; default: the input's folder")
    add(
        "--column",
        dest="columns",
        type=_column,
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the input's own name of a field, as question=problem; may be repeated; FIELD is one of "
        f"image, {', '.join(FIELD_NAMES)}",
    )
    add("--drop", action="append", default=[], metavar="NAME", help="leave out a field of the input; may be repeated")
    add("--split", metavar="NAME", help="the split, where SRC has several")
    add("--system", metavar="TEXT", help="system prompt of samples that have none")
    add("--source", metavar="NAME", help="name of the data set, in samples that do not say theirs")
    add(
        "--prepend-images",
        action="store_true",
        help="show the images before the first question where the text has no <image>",
    )
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="records that make a shard; default 1000")
    add("--workers", type=int, metavar="N", help="processes; default one a core, 16 at most")
    add(
        "--max-rejected",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="fail, and leave no shards, when a larger share of the records is rejected; default 0.05",
    )
    add("--overwrite", action="store_true", help="replace the shards in DST")
    add("--limit", type=int, metavar="N", help="only so many records, from the first")
    parser.set_defaults(run=partial(_convert, parser))


def _convert(parser: argparse.ArgumentParser, options: dict[str, Any]) -> None:
    if options.pop("validate"):
        if options["dst"] is not None:
            parser.error("--validate checks the shards SRC; leave DST out")
        others = [name for name in options if name not in OF_VALIDATE and options[name] != parser.get_default(name)]
        if others:
            parser.error(f"{_flag(others[0])} does not go with --validate, which checks shards of any kind")
        _validate(ConvertConfig(options["src"], "", workers=options["workers"]))
        return
    if options["dst"] is None:
        parser.error("DST is missing: the folder of the shards (or --validate, to check the shards SRC)")
    benchmark = options.pop("benchmark")
    if benchmark is not None:
        given = [name for name in NOT_OF_BENCHMARKS if options[name] != parser.get_default(name)]
        if given:
            parser.error(f"{_flag(given[0])} does not go with --benchmark, which knows the fields of {benchmark}")
    options["columns"] = dict(options["columns"])
    options["drop"] = tuple(options["drop"])
    config = ConvertConfig(**options)
    if benchmark is None:
        print(convert(config))
        return
    report, asked = convert_benchmark(benchmark, config), BENCHMARKS[benchmark].questions
    print(report)
    if report.samples != asked and not config.limit:
        print(f"{benchmark} has {asked} questions; results on these {report.samples} are not those of the benchmark")


def _flag(name: str) -> str:
    return "--" + {"columns": "column"}.get(name, name).replace("_", "-")


def _validate(config: ConvertConfig) -> None:
    report = validate(config.src, workers=config.num_workers)
    counts = f"{report.samples} samples in {report.shards} shard(s)"
    if report.num_problems:
        raise ValueError(f"{config.src}: {report.num_problems} problem(s) in {counts}, each named above")
    without = "" if report.manifest else "; there is no manifest.json to check sizes and checksums by"
    print(f"{counts}, all good{without}")


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals or not theirs or (ours != "image" and ours not in FIELD_NAMES):
        raise argparse.ArgumentTypeError(f"{text!r}, expected FIELD=NAME with one of image, {', '.join(FIELD_NAMES)}")
    return ours, theirs
