"""Time of a steered forward over an unsteered one, in layers of the size of Qwen2.5-VL-3B's.

Every way of steering runs in turn in one process, round after round, and each time is divided by the unsteered one of
its round. Decoding is timed too: one new token over a cache. Writes a CSV and a table to benchmarks/results/.

    python benchmarks/steering_overhead.py
    python benchmarks/steering_overhead.py --device cuda --dtype bfloat16 --layers 8 --lengths 2048 8192
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import subjects
import torch
from measuring import (
    about,
    as_cell,
    as_columns,
    clock,
    in_process,
    page,
    parser_of,
    peak_of,
    positive,
    quantiles,
    rounded,
    write,
)
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


def steering(model: PreTrainedModel, way: str, roles: torch.Tensor) -> AbstractContextManager[None]:
    """One way of steering, or none."""
    return nullcontext() if WAYS[way] is None else steer_attention(model, roles, **WAYS[way])


@torch.inference_mode()
def measure_memory(model: PreTrainedModel, args: argparse.Namespace, length: int, way: str) -> float:
    """Peak of a prefill and one more token above the model, in this process."""
    ids = torch.full((1, length), 50, device=args.device)

    def work() -> None:
        with steering(model, way, subjects.make_roles(length, args.device)):
            step(model, ids[:, :1], model(input_ids=ids, logits_to_keep=1).past_key_values, 1)

    return peak_of(work, args.device)


@torch.inference_mode()
def measure_seconds(
    model: PreTrainedModel, args: argparse.Namespace, length: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of a prefill of `length` tokens and of one more token, by phase and way."""
    roles = subjects.make_roles(length, args.device)
    ids = torch.arange(length, device=args.device).remainder(200).add(50)[None]
    seconds: dict[tuple[str, str], list[float]] = {(phase, way): [] for phase in ("prefill", "decode") for way in WAYS}
    for round_number in range(args.repeats + 1):
        for way in WAYS:
            with steering(model, way, roles):
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
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=15)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[512, 1024], help="tokens of the prefill")
    parser.add_argument("--decoded", type=positive, default=16, help="tokens decoded after it")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--layers", type=positive, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for length in args.lengths:
        subjects.make_roles(length)  # which knows what lengths are too short
    model = build(args)
    if args.measure is not None:
        length, way = args.measure.split(":")
        print(json.dumps(measure_memory(model, args, int(length), way)))
        return
    rows = []
    for length in args.lengths:
        seconds = measure_seconds(model, args, length)
        peaks = {way: round(in_process(f"{length}:{way}"), 1) for way in WAYS}
        for (phase, way), values in seconds.items():
            ratios = [value / plain for value, plain in zip(values, seconds[phase, "unsteered"], strict=True)]
            row = {"length": length, "phase": phase, "steering": way, "seconds_p50": rounded(quantiles(values)[1])}
            row |= as_columns("ratio", ratios) | {"peak_mib": peaks[way]}
            rows.append(row)
            print(row, flush=True)
    settings = {name: getattr(args, name) for name in ("dtype", "attn", "layers", "repeats")}
    settings |= about(args.device, args.threads)
    path = args.output / f"steering_overhead_{args.device}.csv"
    write(path, rows, settings, table(rows, args.lengths, settings))


def table(rows: list[dict], lengths: list[int], settings: dict) -> str:
    """Markdown: ratios to the unsteered forward of the same round."""
    found = {(row["length"], row["phase"], row["steering"]): row for row in rows}
    columns = [(phase, length) for phase in ("prefill", "decode") for length in lengths]
    return page(
        "Time of a steered forward",
        settings,
        "Ratio to the unsteered forward of the same round, p50 (p20 to p80); tokens are decoded in turn. "
        "Peaks, of a prefill and one more token, are above the model.",
        [
            "steering",
            *(f"{phase}, {length} tokens" for phase, length in columns),
            *(f"peak MiB, {length}" for length in lengths),
        ],
        [
            [
                way,
                *(as_cell(found[length, phase, way], "ratio", digits=3) for phase, length in columns),
                *(f"{found[length, 'prefill', way]['peak_mib']:.0f}" for length in lengths),
            ]
            for way in WAYS
        ],
    )


if __name__ == "__main__":
    main()
