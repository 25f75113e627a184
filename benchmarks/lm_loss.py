"""Peak memory and time of the LM loss: the model's own logits, all at once, beside a few at a time, and liger's kernel.

One forward and backward of a small Qwen2.5-VL with the released models' vocabulary, at several lengths and shares of
tokens that carry a label. Each memory figure comes from a process of its own; times are paired, every contestant in
turn in one process. Writes a CSV and a table to benchmarks/results/, with device, versions and date.

    python benchmarks/lm_loss.py
    python benchmarks/lm_loss.py --device cuda --lengths 4096 16384 --hidden 3584 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from measuring import about, as_cell, in_process, in_turn, page, paired, parser_of, peak_of, write
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from avar_lightning.losses.liger import has_liger
from avar_lightning.scoring import ScoringConfig, lm_loss

WARM_UP_LENGTH = 64


def contestants(device: str) -> list[str]:
    """The model's own loss first, which the others are compared with."""
    return ["own", "chunked"] + (["liger"] if device.startswith("cuda") and has_liger() else [])


def build(args: argparse.Namespace) -> PreTrainedModel:
    """One text layer and the whole head; the vision tower has no work."""
    torch.manual_seed(0)
    text = {
        "vocab_size": args.words,
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2 * max(args.lengths),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": args.hidden}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config).to(args.device, getattr(torch, args.dtype))


def step(args: argparse.Namespace, model: PreTrainedModel, name: str, length: int, share: float) -> None:
    """Forward and backward of the mean loss over the last `share` of the tokens."""
    input_ids = torch.arange(length, device=args.device).remainder(1000)[None]
    labels = input_ids.masked_fill(input_ids.new_ones(length).cumsum(0) <= length * (1 - share), -100)
    if name == "own":
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    else:
        total, count = lm_loss(model, {"input_ids": input_ids}, labels, config=ScoringConfig(kernel=name))
        loss = total / count
    loss.backward()
    model.zero_grad(set_to_none=True)


def measure_memory(args: argparse.Namespace, name: str, length: int, share: float) -> float:
    """Peak of one step, in this process."""
    model = build(args)
    step(args, model, name, WARM_UP_LENGTH, share)
    return peak_of(lambda: step(args, model, name, length, share), args.device)


def measure_seconds(args: argparse.Namespace, length: int, share: float) -> dict[str, list[float]]:
    """Seconds of every contestant in turn, `args.repeats` times."""
    model, names = build(args), contestants(args.device)
    for name in names:
        step(args, model, name, WARM_UP_LENGTH, share)
    return in_turn({name: partial(step, args, model, name, length, share) for name in names}, args.repeats, args.device)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements, one row a length, share and contestant."""
    rows = []
    for length in args.lengths:
        for share in args.shares:
            seconds = in_process(f"seconds:{length}:{share}")
            for name in contestants(args.device):
                row = {"length": length, "labelled": share, "loss": name}
                row["peak_mib"] = round(in_process(f"memory:{length}:{share}:{name}"), 1)
                rows.append(row | paired(seconds, name, "own"))
                print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: memory and time of each."""
    return page(
        "LM loss: peak memory and time of forward + backward",
        settings,
        "`own` is the model's loss on all its logits. Peaks are above the model itself, and hold the gradient of the "
        "embeddings; times are ratios to `own` in the same round, p50 (p20 to p80).",
        ["tokens", "labelled", "loss", "peak MiB", "time"],
        [
            [
                str(row["length"]),
                f"{row['labelled']:.0%}",
                row["loss"],
                f"{row['peak_mib']:.0f}",
                as_cell(row, "ratio"),
            ]
            for row in rows
        ],
    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="tokens")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25], help="of tokens that carry a label")
    parser.add_argument("--words", type=int, default=151_936, help="size of the vocabulary")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def main() -> None:
    """Measure everything, or one thing in a process of its own."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.measure is None:
        settings = {name: getattr(args, name) for name in ("words", "hidden", "dtype", "repeats")}
        settings |= about(args.device, args.threads)
        rows = run(args)
        write(args.output / f"lm_loss_{args.device}.csv", rows, settings, table(rows, settings))
        return
    what, length, share, *name = args.measure.split(":")
    measured = (
        measure_memory(args, name[0], int(length), float(share))
        if what == "memory"
        else measure_seconds(args, int(length), float(share))
    )
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
