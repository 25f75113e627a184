"""Where the time of a guided SFT step goes: shares of its CPU seconds by part, of the steps that `sft_step.py` times.

Python's profiler sees every call, which lengthens what calls much; so read shares, not seconds. Writes a CSV and a
table to benchmarks/results/.

    python benchmarks/step_profile.py
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import sft_step
import torch
from measuring import about, hush, page, parser_of, write
from subjects import Case

WARM_UP = 2
NAMES = ("plain", "hinge, Q = T", "published, Q = U")
CALLS = {  # file and functions
    "attention kernel, forward": ("attention/kernels.py", "forward"),
    "attention kernel, backward": ("attention/kernels.py", "backward"),
    "around it, forward": ("attention/fused.py", "forward"),
    "around it, backward": ("attention/fused.py", "backward"),
    "carrying the gradient of the log-sum-exp": ("attention/kernels.py", "carry_gradient"),
    "masses, forward": ("attention/mass.py", "attention_mass"),
    "masses, backward": ("attention/mass.py", "backward"),
    "observing": ("attention/observing.py", "observe", "many_groups"),
    "guidance loss": ("avar_lightning/guidance.py", "guide"),
    "logging": ("pytorch/core/module.py", "log"),
    "optimizer": ("optim/adam.py", "adam"),
}
INSIDE = {  # what they call of the others
    "around it, forward": ("attention kernel, forward",),
    "around it, backward": ("attention kernel, backward", "carrying the gradient of the log-sum-exp"),
    "observing": ("masses, forward",),
}


class Profile(L.Callback):
    """Profiles every step after some others, from its start to its end."""

    def __init__(self) -> None:
        self.profile, self.seconds = cProfile.Profile(), 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin."""
        if batch_idx >= WARM_UP:
            self.started = time.process_time()
            self.profile.enable()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End."""
        if batch_idx >= WARM_UP:
            self.profile.disable()
            self.seconds += time.process_time() - self.started


def shares(profile: cProfile.Profile, seconds: float) -> dict[str, float]:
    """Percent of all seconds by part; parts do not overlap."""
    taken: dict[str, float] = dict.fromkeys(CALLS, 0.0)
    for (file, _, function), (*_, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for part, (ending, *names) in CALLS.items():
            if file.endswith(ending) and function in names:
                taken[part] += cumulative
    for part, others in INSIDE.items():
        taken[part] -= sum(taken[other] for other in others)
    taken["everything else"] = seconds - sum(taken.values())
    return {part: round(100 * value / seconds, 1) for part, value in taken.items()}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a case and guidance."""
    rows = []
    for case in [Case.without_image(text) for text in args.cases]:
        for name in NAMES:
            measured = Profile()
            work: Callable[[], Any] = sft_step.ours(args, case, name, WARM_UP + args.repeats, measured)
            work()
            row = {"size": case.size, "layers": case.layers, "length": case.length, "guidance": name}
            rows.append(row | shares(measured.profile, measured.seconds))
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: a part a row."""
    headings = [f"{row['size']}-{row['layers']}-{row['length']}, {row['guidance']}" for row in rows]
    return page(
        "Where the time of a guided SFT step goes",
        settings,
        "Percent of the step's CPU seconds. Kernels are those of the text decoder, around which heads are made wider; "
        "observing is choosing rows and keys and keeping masses. A plain step's attention is part of everything else.",
        ["part", *headings],
        [[part, *(f"{row[part]:.1f}" for row in rows)] for part in (*CALLS, "everything else")],
    )


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=["small-4-512", "small-4-2048", "medium-8-2048"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.set_defaults(attn="sdpa")
    args = parser.parse_args()
    if args.device != "cpu":
        raise SystemExit(f"--device is {args.device!r}, expected cpu: on a GPU use torch.profiler.")
    torch.set_num_threads(args.threads)
    hush()
    settings = {"dtype": args.dtype, "repeats": args.repeats} | about(args.device, args.threads)
    rows = run(args)
    write(args.output / "step_profile_cpu.csv", rows, settings, table(rows, settings))


if __name__ == "__main__":
    main()
