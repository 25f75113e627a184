"""What the benchmarks share: quantiles of paired ratios, where they were measured, and their files."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from avar_lightning.report import markdown_table


def quantiles(values: list[float]) -> list[float]:
    """20th, 50th and 80th percentile."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()


def as_columns(name: str, values: list[float]) -> dict[str, float]:
    """The percentiles under `<name>_p20`, `<name>_p50` and `<name>_p80`."""
    columns = (f"{name}_p20", f"{name}_p50", f"{name}_p80")
    return dict(zip(columns, map(rounded, quantiles(values)), strict=True))


def as_cell(row: dict[str, Any], name: str, digits: int = 2) -> str:
    """The same as "p50 (p20 to p80)"."""
    low, middle, high = (f"{row[f'{name}_{p}']:.{digits}f}" for p in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"


def paired(seconds: dict[str, list[float]], name: str, reference: str) -> dict[str, float]:
    """Columns of one contestant: its seconds, and their ratios to the reference's of the same rounds."""
    ratios = [mine / other for mine, other in zip(seconds[name], seconds[reference], strict=True)]
    return as_columns("seconds", seconds[name]) | as_columns("ratio", ratios)


def clock(device: str) -> float:
    """Seconds, once all work is done.

    On one CPU thread those of this process, which others and a busy host do not lengthen.
    """
    synchronize(device)
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def in_turn(
    works: Mapping[str, Callable[[], Any]], repeats: int, device: str, *, warm_up: int = 0
) -> dict[str, list[float]]:
    """Seconds of every work in turn, round after round; the first `warm_up` rounds are not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + repeats):
        for name, work in works.items():
            start = clock(device)
            work()
            taken = clock(device) - start
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_of(function: Callable[[], None], device: str) -> float:
    """Peak memory of a call above what was in use before it, in MiB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Writing 5 sets the process's peak back to what it uses now (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmHWM")
    function()
    return (status_kib("VmHWM") - before) / 2**10


def status_kib(name: str) -> int:
    """One field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def parser_of(description: str) -> argparse.ArgumentParser:
    """Options of a benchmark that measures each thing in a process of its own (`in_process`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=9, help="timed rounds")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def positive(text: str) -> int:
    """Type of an option that counts."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1.")
    return number


def device(text: str) -> str:
    """Type of the option for the device, which must be there."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither cpu nor cuda; choose among several GPUs with CUDA_VISIBLE_DEVICES."
        )
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch finds no GPU here (torch.cuda.is_available() is False).")
    return text


def in_process(what: str) -> Any:
    """Run this program once more, with the same options, for one measurement; returns what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--measure", what], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        why = "; it was killed, perhaps for want of memory" if done.returncode < 0 else ""
        raise SystemExit(f"measurement {what!r} failed with status {done.returncode}{why}.")
    return json.loads(done.stdout.splitlines()[-1])


def hush() -> None:
    """Let Lightning say errors only."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def about(device: str, threads: int) -> dict[str, Any]:
    """Device, versions, commit and date."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def page(
    title: str, settings: dict[str, Any], notes: str, headings: Sequence[str], rows: Iterable[Sequence[str]]
) -> str:
    """Markdown: under what settings, what is to be known, and a table."""
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"# {title}\n\n{told}.\n{notes}\n\n{markdown_table(headings, rows)}\n"


def write(path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], table: str) -> None:
    """The CSV, and beside it the table for reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *settings])
        writer.writeheader()
        writer.writerows(row | settings for row in rows)
    path.with_suffix(".md").write_text(table)
    print(f"wrote {path} and {path.with_suffix('.md').name}")


def _commit() -> str:
    """Of this checkout, and whether files were changed since, but for results."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
    return f"{commit} with changes" if commit and changed else commit or "unknown"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
