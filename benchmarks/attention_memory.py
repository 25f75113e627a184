"""Peak memory and time of attention masses: observed beside SDPA, against eager attention with `output_attentions`.

One forward and backward of a small Qwen2.5-VL's text model at several lengths. Each memory figure comes from a process
of its own; times are paired, every implementation in turn in one process. Writes a CSV and a table to
benchmarks/results/, with device, versions and date.

    python benchmarks/attention_memory.py
    python benchmarks/attention_memory.py --device cuda --lengths 2048 8192 32768 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from measuring import about, as_cell, as_columns, in_process, parser_of, peak_of, synchronize, write
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from avar_lightning.attention import observe_attention
from avar_lightning.losses import attention_share_loss
from avar_lightning.roles import Role

IMPLEMENTATIONS = ("sdpa", "observed", "eager")
WARM_UP_LENGTH = 64
QUERIES = (Role.USER, Role.RESPONSE)
KEYS = (Role.IMAGE, Role.SYSTEM)


def build(args: argparse.Namespace, implementation: str) -> PreTrainedModel:
    """The model, without its vision tower's work: memory of attention is what is measured."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 256,
            "hidden_size": args.heads * args.head_dim,
            "intermediate_size": 2 * args.heads * args.head_dim,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.key_heads,
            "max_position_embeddings": 2 * max(args.lengths),
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                # Time, height and width share the rotary dimensions 2 : 3 : 3, as in the released models.
                "mrope_section": [args.head_dim // 8, args.head_dim * 3 // 16, args.head_dim * 3 // 16],
            },
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    )
    config._attn_implementation = "eager" if implementation == "eager" else "sdpa"
    return Qwen2_5_VLForConditionalGeneration(config).to(args.device, getattr(torch, args.dtype))


def make_roles(length: int, device: str) -> Tensor:
    """A conversation: 1/16 system, 1/4 image, 1/16 question, the rest response."""
    roles = torch.full((1, length), int(Role.RESPONSE), device=device)
    roles[:, : length // 16] = Role.SYSTEM
    roles[:, length // 16 : length * 5 // 16] = Role.IMAGE
    roles[:, length * 5 // 16 : length * 6 // 16] = Role.USER
    return roles


def step(model: PreTrainedModel, implementation: str, length: int) -> None:
    """Forward and backward of a language loss and, but for plain SDPA, a loss on image and system masses."""
    device = str(model.device)
    roles = make_roles(length, device)
    input_ids = torch.arange(length, device=device).remainder(200)[None]
    inputs: dict[str, Any] = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    query_mask = torch.isin(roles, torch.tensor(QUERIES, device=device))
    if implementation == "sdpa":
        loss = model(**inputs).loss
    elif implementation == "observed":
        with observe_attention(model, roles, queries=QUERIES, keys=KEYS) as record:
            loss = model(**inputs).loss
        loss = loss + attention_share_loss(record.mass_of(KEYS[0]), record.mass_of(KEYS[1]), query_mask)
    else:
        out = model(**inputs, output_attentions=True)
        groups = torch.stack([roles == key for key in KEYS], dim=-1)[:, None]
        masses = torch.stack([attention @ groups.to(attention.dtype) for attention in out.attentions]).float()
        loss = out.loss + attention_share_loss(masses[..., 0], masses[..., 1], query_mask)
    loss.backward()
    model.zero_grad(set_to_none=True)


def measure_memory(args: argparse.Namespace, implementation: str, length: int) -> float:
    """Peak of one step, in this process."""
    model = build(args, implementation)
    step(model, implementation, WARM_UP_LENGTH)
    return peak_of(lambda: step(model, implementation, length), args.device)


def measure_seconds(args: argparse.Namespace, length: int) -> dict[str, list[float]]:
    """Seconds of every implementation in turn, `args.repeats` times, after one untimed round at a short length."""
    models = {name: build(args, name) for name in IMPLEMENTATIONS}
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for name, model in models.items():
        step(model, name, WARM_UP_LENGTH)
    for _ in range(args.repeats):
        for name, model in models.items():
            synchronize(args.device)
            start = time.perf_counter()
            step(model, name, length)
            synchronize(args.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements, one row a length and implementation."""
    rows = []
    for length in args.lengths:
        seconds = in_process(f"seconds:{length}")
        for name in IMPLEMENTATIONS:
            ratios = [mine / plain for mine, plain in zip(seconds[name], seconds["sdpa"], strict=True)]
            row = {"length": length, "implementation": name}
            row["peak_mib"] = round(in_process(f"memory:{length}:{name}"), 1)
            row |= as_columns("seconds", seconds[name]) | as_columns("ratio", ratios)
            rows.append(row)
            print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: memory and time of each length, and how far eager is above observing."""
    peak = {(row["length"], row["implementation"]): row["peak_mib"] for row in rows}
    lines = [
        "# Attention masses: peak memory and time of forward + backward",
        "",
        ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        "Peaks are above the model itself; times are ratios to plain SDPA of the same round, p50 (p20 to p80).",
        "",
        "| tokens | sdpa MiB | observed MiB | eager MiB | eager / observed | observed time | eager time |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        sdpa, observed, eager = (peak[length, name] for name in IMPLEMENTATIONS)
        times = {row["implementation"]: as_cell(row, "ratio") for row in rows if row["length"] == length}
        lines.append(
            f"| {length} | {sdpa:.0f} | {observed:.0f} | {eager:.0f} | {eager / observed:.1f}× "
            f"| {times['observed']} | {times['eager']} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    """Measure everything, or one thing in a process of its own."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.measure is None:
        names = ("dtype", "layers", "heads", "key_heads", "head_dim", "repeats")
        settings = {name: getattr(args, name) for name in names} | about(args.device, args.threads)
        rows = run(args)
        write(args.output / f"attention_memory_{args.device.split(':')[0]}.csv", rows, settings, table(rows, settings))
        return
    what, length, *name = args.measure.split(":")
    result = measure_memory(args, name[0], int(length)) if what == "memory" else measure_seconds(args, int(length))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
