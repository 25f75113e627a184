"""Samples per second from shards to batches, beside decoding alone and beside `datasets` with TRL's collator.

Four tables, written with a CSV each to benchmarks/results/:

- in one process, contestants in turn on the same samples, each round's time divided by that of plain PIL decoding;
- whole epochs by number of workers, from local files, a pipe, and a real HTTP server on loopback that drops one in
  four transfers half-way (first with nothing fetched, then with everything);
- the share of padding tokens, with and without length groups;
- the share of a training's time that the trainer waits for data, by number of workers.

    python benchmarks/data_pipeline.py
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import logging
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
import trl
import webdataset as wds
from lightning.pytorch.profilers import SimpleProfiler
from measuring import about, as_cell, as_columns, rounded, write
from PIL import Image
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from avar_lightning import SFTModule
from avar_lightning.data import Sample, ShardDataModule, find_shards, write_shards
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.model import VLMConfig
from avar_lightning.processing import load_processor

LIMIT, THEIRS, OURS = "PIL decoding alone", "datasets + TRL's collator", "shards to batches"
WORDS = ("the", "bar", "is", "red", "and", "taller", "than", "one", "that", "looks", "green", "so", "we", "see", "it")


def samples(count: int, seed: int = 0) -> Iterator[Sample]:
    """Pictures of 224 to 672 pixels a side, smooth as photographs are, and responses of 10 to 400 words."""
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        width, height = rng.choice(range(224, 673, 28)), rng.choice(range(224, 673, 28))
        coarse = Image.frombytes("RGB", (width // 14, height // 14), rng.randbytes(width // 14 * (height // 14) * 3))
        words = min(int(10 * rng.lognormvariate(1, 1.2)) + 10, 400)
        yield Sample(
            messages=[
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=words))},
            ],
            images=[coarse.resize((width, height), Image.Resampling.BICUBIC)],
            answer="x",
        )


def module_of(shards: Any, args: argparse.Namespace, **options: Any) -> ShardDataModule:
    settings = {"processor": args.processor, "batch_size": args.batch_size, "num_workers": 0} | options
    return ShardDataModule(train=shards, **settings)


def forever(make: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield from make()


def decoding(folder: Path, args: argparse.Namespace) -> Iterator[Any]:
    """The same images, from bytes in memory."""
    files = [raw["0.jpg"] for raw in wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)]
    batches = [files[i : i + args.batch_size] for i in range(0, len(files), args.batch_size)]
    return forever(lambda: ([Image.open(io.BytesIO(file)).convert("RGB") for file in batch] for batch in batches))


def with_trl(folder: Path, args: argparse.Namespace) -> Iterator[Any]:
    """An Arrow data set of prompts, completions and images, as SFTTrainer would load it."""
    rows = []
    for raw in wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).decode():
        messages = raw["json"]["messages"]
        rows.append({"images": [{"bytes": raw["0.jpg"]}], "prompt": messages[:-1], "completion": messages[-1:]})
        for message in rows[-1]["prompt"] + rows[-1]["completion"]:  # Arrow wants one type a column
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    collator = DataCollatorForVisionLanguageModeling(args.processor, completion_only_loss=True)
    return forever(lambda: DataLoader(table, args.batch_size, shuffle=True, collate_fn=collator))


def in_one_process(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each contestant in turn, round after round."""
    ours = module_of(str(folder), args)
    contestants = {
        LIMIT: decoding(folder, args),
        OURS: forever(ours.train_dataloader),
        THEIRS: with_trl(folder, args),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(args.rounds + 1):
        for name, batches in contestants.items():
            start = time.process_time()
            for _ in range(args.batches):
                next(batches)
            if round_number:  # the first warms up
                seconds[name].append((time.process_time() - start) / args.batches / args.batch_size)
    rows = []
    for name, values in seconds.items():
        row: dict[str, Any] = {"pipeline": name} | as_columns("milliseconds", [1e3 * value for value in values])
        row |= as_columns("ratio", [value / limit for value, limit in zip(values, seconds[LIMIT], strict=True)])
        rows.append(row | as_columns("to_trl", [v / other for v, other in zip(values, seconds[THEIRS], strict=True)]))
        print(rows[-1], flush=True)
    return rows


class DroppingServer(http.server.SimpleHTTPRequestHandler):
    """Breaks off one in four transfers of a shard half-way; knows byte ranges."""

    count = 0

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        type(self).count += self.path.endswith(".tar")
        drop = self.path.endswith(".tar") and self.count % 4 == 1
        self.wfile.write(data[first : first + (len(data) - first) // 2] if drop else data[first:])

    def log_message(self, *_: Any) -> None:
        pass


def whole_epochs(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Wall clock of an epoch: every contestant once a round."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(DroppingServer, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/manifest.json"
    pipes = [f"pipe:cat {shard.url}" for shard in find_shards(str(folder))]
    sources = {"local files": str(folder), "pipe:, first epoch": pipes, "HTTP that drops, first epoch": url}
    sources |= {"HTTP that drops, later": url}
    cases = [(name, workers) for name in sources for workers in ((0, 1, 2) if name == "local files" else (2,))]
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    cache = tempfile.mkdtemp()
    for _ in range(args.epochs):
        for name, workers in cases:
            if name.endswith("first epoch"):
                shutil.rmtree(cache, ignore_errors=True)
            data = module_of(sources[name], args, num_workers=workers, cache_folder=cache)
            start, count = time.perf_counter(), 0
            for batch in data.train_dataloader():
                count += len(batch["columns"])
            rates[name, workers].append(count / (time.perf_counter() - start))
            data.teardown("fit")
    server.shutdown()
    shutil.rmtree(cache, ignore_errors=True)
    rows = [{"source": n, "workers": w} | as_columns("samples_per_second", v) for (n, w), v in rates.items()]
    print(*rows, sep="\n", flush=True)
    return rows


def padding(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of padding among the tokens of an epoch's batches, and what sorting costs the main process."""
    rows = []
    for group in (0, 8, 64):
        data = module_of(str(folder), args, length_group=group * args.batch_size)
        masks = [batch["attention_mask"] for batch in data.train_dataloader()]
        tokens, real = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
        reader = data.train_dataloader().reader
        start, order = time.process_time(), reader.order(0)
        for position in range(reader.total or 0):
            reader.length(order.place(position))
        cost = 1e3 * (time.process_time() - start) / (reader.total or 1) if group else 0.0
        rows.append({"batches a group": group, "padding": rounded(1 - real / tokens), "ms_a_sample": rounded(cost)})
    print(*rows, sep="\n", flush=True)
    return rows


def waiting(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of a guided training's time in which the trainer waits for its next batch."""
    shares: dict[int, list[float]] = {0: [], 1: [], 2: []}
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(args.trainings):
        for workers in shares:
            profiler = SimpleProfiler()
            trainer = L.Trainer(
                accelerator="auto",
                max_steps=args.steps,
                logger=False,
                profiler=profiler,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
            )
            profiler.describe = lambda: None  # its long report would go to the screen
            module = SFTModule(VLMConfig("demo", from_scratch=True), GuidanceConfig(form="hinge"))
            trainer.fit(module, module_of(str(folder), args, num_workers=workers))
            spent = {name: sum(values) for name, values in profiler.recorded_durations.items()}
            wait = next(value for name, value in spent.items() if name.endswith("train_dataloader_next"))
            shares[workers].append(wait / spent["run_training_epoch"])
            rates[workers].append(args.steps / spent["run_training_epoch"])
    rows = [
        {"workers": n} | as_columns("waiting", shares[n]) | as_columns("steps_per_second", rates[n]) for n in shares
    ]
    print(*rows, sep="\n", flush=True)
    return rows


def tables(found: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> str:
    """Markdown of all four."""
    lines = [
        "# From shards to batches",
        "",
        ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        "p50 (p20 to p80).",
        "",
        "In one process, CPU time a sample, and its ratio to PIL decoding alone and to TRL's of the same round:",
        "",
        "| pipeline | ms a sample | to decoding | to TRL |",
        "|---|---|---|---|",
    ]
    for row in found["process"]:
        cells = (as_cell(row, "milliseconds"), as_cell(row, "ratio"), as_cell(row, "to_trl"))
        lines.append(f"| {row['pipeline']} | " + " | ".join(cells) + " |")
    lines += ["", "Whole epochs, wall clock:", "", "| source | workers | samples a second |", "|---|---|---|"]
    for row in found["epochs"]:
        lines.append(f"| {row['source']} | {row['workers']} | {as_cell(row, 'samples_per_second', 0)} |")
    lines += ["", "Padding:", "", "| batches a length group | padding (%) | ms a sample to sort |", "|---|---|---|"]
    for row in found["padding"]:
        lines.append(f"| {row['batches a group'] or 'none'} | {100 * row['padding']:.1f} | {row['ms_a_sample']:.2f} |")
    lines += [
        "",
        "A guided training of the demo model, 1.3 million parameters:",
        "",
        "| workers | waiting for data (%) | steps a second |",
        "|---|---|---|",
    ]
    for row in found["waiting"]:
        share = {name: 100 * value for name, value in row.items() if name.startswith("waiting")}
        lines.append(f"| {row['workers']} | {as_cell(share, 'waiting', 1)} | {as_cell(row, 'steps_per_second')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-pixels", type=int, default=448 * 448)
    parser.add_argument("--batches", type=int, default=4, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds in one process")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs")
    parser.add_argument("--trainings", type=int, default=3, help="trainings of each number of workers")
    parser.add_argument("--steps", type=int, default=12, help="steps of a training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.processor = load_processor("demo", max_pixels=args.max_pixels)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(samples(args.samples), folder, samples_per_shard=64, image_format="jpg")
        found = {
            "process": in_one_process(folder, args),
            "epochs": whole_epochs(folder, args),
            "padding": padding(folder, args),
            "waiting": waiting(folder, args),
        }
    names = ("samples", "batch_size", "max_pixels", "rounds", "epochs", "trainings", "steps")
    settings = {name: getattr(args, name) for name in names} | about("cpu", args.threads)
    settings |= {"trl": trl.__version__, "datasets": datasets.__version__}
    rows = [{"table": table, **row} for table, part in found.items() for row in part]
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    write(args.output / "data_pipeline_cpu.csv", rows, settings, tables(found, settings))


if __name__ == "__main__":
    main()
