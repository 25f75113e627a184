"""`avar sweep`: its options, and what it prints."""

from __future__ import annotations

import argparse
from glob import glob
from typing import Any

from avar_lightning.attention import MODES
from avar_lightning.report import interventions_table
from avar_lightning.roles import Role
from avar_lightning.sweep import SweepConfig, sweep


def add_sweep(commands: Any) -> None:
    """Add the subcommand."""
    sweep = commands.add_parser(
        "sweep",
        allow_abbrev=False,
        help="steer a model with a grid of strengths, and compare its answers and attention",
        description=(
            "Answer the prompts in SHARDS unsteered and under every combination of strengths, and write answers, a "
            "CSV, a table and heat maps to DST. An interrupted sweep goes on when it is called again."
        ),
    )
    sweep.add_argument("models", metavar="MODEL", help="folder, hub name, demo, or Lightning checkpoint; a glob or a "
                       "comma-separated list sweeps several and pools them")  # fmt: skip
    sweep.add_argument(
        "shards", metavar="SHARDS", help="prompts with answers: a .tar, folder, glob or {000..009} pattern"
    )
    sweep.add_argument("output", metavar="DST", help="folder of the results")
    strength = {"type": _numbers, "metavar": "X,X,…"}
    sweep.add_argument(
        "--image",
        **strength,
        default=(0.0, 0.15, 0.3),
        help="on image tokens; default 0,0.15,0.3 (--image=-0.5,0 if the first is negative)",
    )
    sweep.add_argument("--system", **strength, default=(0.0, 0.05, 0.4, 0.6), help="lowers system tokens; default "
                       "0,0.05,0.4,0.6")  # fmt: skip
    sweep.add_argument("--mode", type=_words, default=("logit",), metavar="MODE,…", help=f"some of {', '.join(MODES)}; "
                       "default logit")  # fmt: skip
    sweep.add_argument("--queries", type=_queries, help="steered rows: user, response, both (user,response) or last; "
                       "default every row")  # fmt: skip
    sweep.add_argument("--layers", help='steered layers, "9-14" or "0.3-0.5"; default all')
    sweep.add_argument("--max-new-tokens", type=int, default=256, help="longest answer; default 256")
    sweep.add_argument("--batch-size", type=int, default=8, help="prompts answered together; default 8")
    sweep.add_argument("--max-samples", type=int, help="only so many samples, from the first")
    sweep.add_argument("--attn-implementation", default="sdpa", help="attention kernel of transformers; default sdpa")
    sweep.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    sweep.add_argument("--device", default="auto", help="default: cuda where there is one")
    sweep.add_argument("--overwrite", action="store_true", help="delete another sweep's answers in DST")
    sweep.set_defaults(run=_sweep)


def _sweep(options: dict[str, Any]) -> None:
    options["models"] = _models(options["models"])
    results = sweep(SweepConfig(**options))
    print(f"{interventions_table(results)}\n\nresults  {options['output']}")


def _models(text: str) -> list[str]:
    """Names of a comma-separated list, globs expanded."""
    found: list[str] = []
    for name in text.split(","):
        matches = sorted(glob(name)) if any(mark in name for mark in "*?[") else [name]
        if not matches:
            raise FileNotFoundError(f"No model matches {name!r}; check the pattern.")
        found += matches
    return found


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 0,0.15,0.3") from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _queries(text: str) -> tuple[int, ...] | str:
    if text == "last":
        return text
    known = {"user": Role.USER, "response": Role.RESPONSE}
    words = _words(text)
    if set(words) - set(known):
        raise argparse.ArgumentTypeError(f"{text!r}, expected user, response, user,response or last")
    return tuple(known[word] for word in words)
