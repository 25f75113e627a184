"""Time of a steered forward over an unsteered one, in layers of the size of Qwen2.5-VL-3B's.

Every way of steering runs in turn in one process, round after round, and each time is divided by the unsteered one of
its round. Decoding is timed too: one new token over a cache. Writes a CSV and a table to benchmarks/results/.

    python benchmarks/steering_overhead.py
    python benchmarks/steering_overhead.py --device cuda --dtype bfloat16 --layers 8 --lengths 2048 8192
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import subjects
import torch
from measuring import about, as_cell, as_columns, clock, page, quantiles, rounded, write
from transformers import PreTrainedModel

from avar_lightning import steer_attention
from avar_lightning.roles import Role

TEXT = (Role.USER, Role.RESPONSE)
WAYS = {
    "unsteered": None,
    "unsteered again": None,  # how far two equal forwards lie apart
    "logit": {"mode": "logit"},
    "mass": {"mode": "mass"},
    "mass, text rows": {"mode": "mass", "queries": TEXT},
    "logit, text rows": {"mode": "logit", "queries": TEXT},
    "abs, last row": {"mode": "abs", "queries": "last"},
    "abs": {"mode": "abs"},
}


def build(args: argparse.Namespace) -> PreTrainedModel:
    """Decoder layers of Qwen2.5-VL-3B (heads of 128, 16 query and 2 key heads) under a small vocabulary."""
    options = {"layers": args.layers, "device": args.device, "dtype": args.dtype}
    return subjects.build("3b", attention=args.attn, length=max(args.lengths), **options).eval()


@torch.inference_mode()
def measure(model: PreTrainedModel, args: argparse.Namespace, length: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of a prefill of `length` tokens and of one more token, by phase and way."""
    roles = subjects.make_roles(length, args.device)
    ids = torch.arange(length, device=args.device).remainder(200).add(50)[None]
    seconds: dict[tuple[str, str], list[float]] = {(phase, way): [] for phase in ("prefill", "decode") for way in WAYS}
    for round_number in range(args.repeats + 1):
        for way, arguments in WAYS.items():
            steering: AbstractContextManager[None] = (
                nullcontext() if arguments is None else steer_attention(model, roles, **arguments)
            )
            with steering:
                output, prefill = timed(partial(model, input_ids=ids, logits_to_keep=1), args.device)
                continued = partial(step, model, ids[:, :1], output.past_key_values, args.decoded)
                _, decode = timed(continued, args.device)
            if round_number:  # the first warms up
                seconds["prefill", way].append(prefill)
                seconds["decode", way].append(decode / args.decoded)
    return seconds


def step(model: PreTrainedModel, token: torch.Tensor, cache: object, count: int) -> None:
    """Decode `count` tokens."""
    for _ in range(count):
        model(input_ids=token, past_key_values=cache)


def timed(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    start = clock(device)
    result = function()
    return result, clock(device) - start


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="tokens of the prefill")
    parser.add_argument("--decoded", type=int, default=4, help="tokens decoded after it")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args)
    rows = []
    for length in args.lengths:
        seconds = measure(model, args, length)
        for (phase, way), values in seconds.items():
            ratios = [value / plain for value, plain in zip(values, seconds[phase, "unsteered"], strict=True)]
            row = {"length": length, "phase": phase, "steering": way, "seconds_p50": rounded(quantiles(values)[1])}
            row |= as_columns("ratio", ratios)
            rows.append(row)
            print(row, flush=True)
    settings = {name: getattr(args, name) for name in ("dtype", "attn", "layers", "repeats")}
    settings |= about(args.device, args.threads)
    path = args.output / f"steering_overhead_{args.device.split(':')[0]}.csv"
    write(path, rows, settings, table(rows, args.lengths, settings))


def table(rows: list[dict], lengths: list[int], settings: dict) -> str:
    """Markdown: ratios to the unsteered forward of the same round."""
    found = {(row["length"], row["phase"], row["steering"]): row for row in rows}
    columns = [(phase, length) for phase in ("prefill", "decode") for length in lengths]
    return page(
        "Time of a steered forward",
        settings,
        "Ratio to the unsteered forward of the same round, p50 (p20 to p80).",
        ["steering", *(f"{phase}, {length} tokens" for phase, length in columns)],
        [
            [way, *(as_cell(found[length, phase, way], "ratio", digits=3) for phase, length in columns)]
            for way in list(WAYS)[1:]
        ],
    )


if __name__ == "__main__":
    main()
