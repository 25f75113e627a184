"""Decoder layers with attention masses: plain SDPA, observed beside it, and eager attention with `output_attentions`.

One forward and backward of a language loss and, but for plain SDPA, of a loss on the masses of the image and the system
prompt, for several lengths N, image tokens |V| and layers L. Each memory figure comes from a process of its own; times
are paired, every implementation in turn in one process. Writes a CSV and a table to benchmarks/results/.

    python benchmarks/attention_layers.py
    python benchmarks/attention_layers.py --device cuda --dtype bfloat16

A case is SIZE-LAYERS-LENGTH or SIZE-LAYERS-LENGTH-IMAGE, as in `--cases 7b-1-2048 thin-2-4096-256`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import subjects
import torch
from measuring import about, as_cell, in_process, in_turn, page, paired, parser_of, peak_of, write
from subjects import Case
from transformers import PreTrainedModel

from avar_lightning.attention import observe_attention
from avar_lightning.losses import attention_share_loss
from avar_lightning.roles import Role

IMPLEMENTATIONS = ("sdpa", "observed", "eager")
WARM_UP_LENGTH = 64
QUERIES = (Role.USER, Role.RESPONSE)
KEYS = (Role.IMAGE, Role.SYSTEM)
ON_CPU = [
    *(f"thin-2-{length}" for length in (1024, 2048, 4096, 8192, 32768)),
    *(f"thin-2-4096-{image}" for image in (256, 2048)),
    *(f"thin-{layers}-2048" for layers in (4, 8)),
    *(f"7b-1-{length}" for length in (1024, 2048)),
]
ON_CUDA = [
    *(f"7b-1-{length}" for length in (1024, 2048, 4096, 8192, 16384, 32768)),
    *(f"7b-1-16384-{image}" for image in (256, 1024)),
    *(f"7b-{layers}-4096" for layers in (2, 4)),
]
LONGEST_EAGER = 8192
"""Beyond it eager attention is not tried: its matrices grow with the square of the length."""


def implementations(case: Case) -> tuple[str, ...]:
    """Those that are measured."""
    return IMPLEMENTATIONS if case.length <= LONGEST_EAGER else IMPLEMENTATIONS[:2]


def build(args: argparse.Namespace, case: Case, implementation: str) -> PreTrainedModel:
    """The model; its vision tower has no work."""
    return case.build("eager" if implementation == "eager" else args.attn, device=args.device, dtype=args.dtype)


def step(model: PreTrainedModel, implementation: str, length: int, num_image: int | None = None) -> None:
    """Forward and backward of a language loss and, but for plain SDPA, a loss on image and system masses."""
    device = str(model.device)
    roles = subjects.make_roles(length, device, num_image=num_image)
    input_ids = torch.arange(length, device=device).remainder(subjects.WORDS - 56).add(50)[None]
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


def measure_memory(args: argparse.Namespace, case: Case, implementation: str) -> float:
    """Peak of one step, in this process."""
    model = build(args, case, implementation)
    step(model, implementation, WARM_UP_LENGTH)
    return peak_of(lambda: step(model, implementation, case.length, case.num_image), args.device)


def measure_seconds(args: argparse.Namespace, case: Case) -> dict[str, list[float]]:
    """Seconds of every implementation in turn, `args.repeats` times, after one untimed round."""
    models = {name: build(args, case, name) for name in implementations(case)}
    works = {name: partial(step, model, name, case.length, case.num_image) for name, model in models.items()}
    return in_turn(works, args.repeats, args.device, warm_up=1)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements, one row a case and implementation."""
    rows = []
    for text, case in [(text, Case.of(text)) for text in args.cases]:
        seconds = in_process(f"{text}:seconds")
        for name in implementations(case):
            row = case._asdict() | {"num_image": case.num_image or case.length // 16 * 4, "implementation": name}
            row["peak_mib"] = round(in_process(f"{text}:{name}"), 1)
            rows.append(row | paired(seconds, name, "sdpa"))
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: memory and time of each case."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = row["size"], row["layers"], row["length"], row["num_image"]
        cases.setdefault(key, {})[row["implementation"]] = row
    cells = []
    for key, found in cases.items():
        peaks = [f"{found[name]['peak_mib']:.0f}" if name in found else "" for name in IMPLEMENTATIONS]
        times = [as_cell(found[name], "ratio") if name in found else "" for name in IMPLEMENTATIONS[1:]]
        cells.append([*map(str, key), *peaks, *times])
    return page(
        "Attention masses: peak memory and time of forward + backward",
        settings,
        "Peaks are above the model itself; times are ratios to plain SDPA of the same round, p50 (p20 to p80). Queries "
        "are question and response, keys the image (|V| tokens) and the system prompt (N / 16).",
        ["decoder", "layers", "N", "\\|V\\|", "sdpa MiB", "observed MiB", "eager MiB", "observed time", "eager time"],
        cells,
    )


def main() -> None:
    """Measure everything, or one thing in a process of its own."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", help="instead of those that are usual on the device")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attn", default="sdpa", help="the attention beside which masses are observed")
    args = parser.parse_args()
    args.cases = args.cases or (ON_CPU if args.device == "cpu" else ON_CUDA)
    torch.set_num_threads(args.threads)
    if args.measure is None:
        settings = {"dtype": args.dtype, "attn": args.attn, "repeats": args.repeats} | about(args.device, args.threads)
        rows = run(args)
        write(args.output / f"attention_layers_{args.device}.csv", rows, settings, table(rows, settings))
        return
    text, what = args.measure.split(":")
    case = Case.of(text)
    print(json.dumps(measure_seconds(args, case) if what == "seconds" else measure_memory(args, case, what)))


if __name__ == "__main__":
    main()
