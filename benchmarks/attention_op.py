"""The attention operation alone, in the shape of a 7B layer: plain SDPA, with masses, and eager with masses.

28 query heads, 4 key heads, head 128. Masses of the image (|V| tokens) and the system prompt for the last quarter of
the rows, or for all of them after the image. Forward alone, and forward with backward. Times are paired, every
contestant in turn in one process. Writes a CSV and a table to benchmarks/results/.

    python benchmarks/attention_op.py
    python benchmarks/attention_op.py --device cuda --dtype bfloat16 --lengths 1024 4096 16384 32768 --images 256 4096
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from measuring import about, as_cell, in_process, in_turn, page, paired, parser_of, peak_of, positive, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from avar_lightning.attention import attention_mass
from avar_lightning.attention.fused import FusedCalls
from avar_lightning.attention.observing import MANY
from avar_lightning.attention.visibility import Causal, OnKeys, Selection, in_groups

HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128
CONTESTANTS = ("plain", "last quarter", "after the image", "eager, after the image")
PHASES = ("forward", "both")
LONGEST_EAGER, WARM_UP_LENGTH = 4096, 64


def inputs_of(length: int, num_image: int, args: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries, keys and values; groups (1, N, 2); gradient of the output."""
    generator = torch.Generator(args.device).manual_seed(0)
    options: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    shapes = [(1, heads, length, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    *tensors, grad = [torch.randn(shape, generator=generator, **options) for shape in shapes]
    position = torch.arange(length, device=args.device)
    system = position < length // 16
    image = ~system & (position < length // 16 + num_image)
    return [tensor.requires_grad_() for tensor in tensors], torch.stack([image, system], -1)[None], grad


def work_of(name: str, length: int, num_image: int, phase: str, args: Any) -> Callable[[], None]:
    """One forward, or forward and backward."""
    (q, k, v), groups, grad = inputs_of(length, num_image, args)
    first = length - length // 4 if name == "last quarter" else length // 16 + num_image

    def attend() -> list[Tensor]:
        if name == "plain":
            return [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]
        if name.startswith("eager"):
            keys, values = (tensor.repeat_interleave(HEADS // KEY_HEADS, dim=1) for tensor in (k, v))
            hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            probs = (q @ keys.mT * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            return [probs @ values, probs[:, :, first:].float() @ groups[:, None].float()]
        rows = Selection((torch.arange(length, device=q.device) >= first)[None])
        keys, of_keys = in_groups(groups)
        are_many = rows.index_BS.numel() * keys.index_BS.numel() > MANY * length**2
        with FusedCalls(groups if are_many else None) as overheard:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        told = overheard.of(q, k, None)
        if told is None:
            return [out, attention_mass(rows.gather(q), k, groups, visible=Causal(rows))]
        if told.mass_BHNG is not None:
            return [out, rows.gather(told.mass_BHNG)]
        visible = OnKeys(Causal(rows), keys)
        lse_BHQ = rows.gather(told.lse_BHN[..., None])[..., 0]
        return [out, attention_mass(rows.gather(q), keys.gather(k), of_keys, visible=visible, lse_BHQ=lse_BHQ)]

    def work() -> None:
        with torch.set_grad_enabled(phase == "both"):
            outputs = attend()
        if phase == "both":
            torch.autograd.grad(outputs, (q, k, v), [grad, *map(torch.ones_like, outputs[1:])])

    return work


def contestants(length: int) -> tuple[str, ...]:
    """Eager attention is not tried where its matrices are larger than anything else."""
    return CONTESTANTS if length <= LONGEST_EAGER else CONTESTANTS[:-1]


def measure_seconds(args: Any, length: int, num_image: int) -> dict[str, list[float]]:
    """Seconds of every contestant and phase in turn, after a round that warms up."""
    works = {
        f"{phase} {name}": work_of(name, length, num_image, phase, args)
        for phase in PHASES
        for name in contestants(length)
    }
    return in_turn(works, args.repeats, args.device, warm_up=1)


def run(args: Any) -> list[dict[str, Any]]:
    """All measurements, a row for each length, image, phase and contestant."""
    rows = []
    for length in args.lengths:
        for num_image in [image for image in args.images if image <= length // 2]:
            seconds = in_process(f"{length}:{num_image}:seconds")
            for phase in PHASES:
                for name in contestants(length):
                    row = {"length": length, "num_image": num_image, "phase": phase, "attention": name}
                    row["peak_mib"] = round(in_process(f"{length}:{num_image}:{phase}:{name}"), 1)
                    rows.append(row | paired(seconds, f"{phase} {name}", f"{phase} plain"))
                    print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: ratios to plain attention, and peaks."""
    cells = [
        [
            *(str(row[name]) for name in ("length", "num_image", "phase", "attention")),
            as_cell(row, "seconds", digits=3),
            as_cell(row, "ratio"),
            f"{row['peak_mib']:.0f}",
        ]
        for row in rows
    ]
    return page(
        "The attention operation alone, with masses of key groups",
        settings,
        f"{HEADS} query heads, {KEY_HEADS} key heads, head {HEAD_DIM}, causal. Ratios are to plain SDPA of the same "
        "round, p50 (p20 to p80); groups are the image (|V| tokens) and the system prompt (N / 16); rows as named.",
        ["N", "\\|V\\|", "phase", "attention", "seconds", "ratio", "peak MiB"],
        cells,
    )


def main() -> None:
    """Measure everything, or one thing in a process of its own."""
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 2048, 4096], help="tokens")
    parser.add_argument(
        "--images", type=positive, nargs="+", default=[256, 1024], help="image tokens, at most half of all"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if min(args.images) > min(args.lengths) // 2:
        parser.error(f"--images are {args.images}, expected one of at most half of every length of {args.lengths}.")
    if args.measure is None:
        settings = {"dtype": args.dtype, "repeats": args.repeats} | about(args.device, args.threads)
        rows = run(args)
        write(args.output / f"attention_op_{args.device}.csv", rows, settings, table(rows, settings))
        return
    length, num_image, what, *name = args.measure.split(":")
    if what == "seconds":
        print(json.dumps(measure_seconds(args, int(length), int(num_image))))
    else:
        work_of(name[0], WARM_UP_LENGTH, WARM_UP_LENGTH // 4, what, args)()
        print(json.dumps(peak_of(work_of(name[0], int(length), int(num_image), what, args), args.device)))


if __name__ == "__main__":
    main()
