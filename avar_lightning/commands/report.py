"""`avar report`: its options, and what it prints."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from avar_lightning.run_report import ReportConfig, make_report


def add_report(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="draw VAS, training, layers, heads and attention on images of runs, on one page",
        description=(
            "Write pictures of RUNs as PNG to DST, and all of them with tables to DST/index.html, one file that needs "
            "no other. What a run lacks is said on the page."
        ),
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run (runs/NAME/version_N), a vas/ folder or one vas/step_*.json of VASCallback, or folder of "
        "an avar sweep",
    )
    command.add_argument("--output", required=True, metavar="DST", help="folder to write; it is whole or not there")
    command.add_argument("--title", default=ReportConfig.title, help="of the page")
    command.add_argument(
        "--accuracy", default=ReportConfig.accuracy, metavar="METRIC", help="drawn against VAS; default val/accuracy"
    )
    command.add_argument(
        "--each", type=int, default=ReportConfig.each, metavar="N", help="runs that get a section of their own, the "
        "first ones; default 8"
    )  # fmt: skip
    command.add_argument(
        "--overlays", type=int, default=ReportConfig.overlays, metavar="N", help="images a run with the attention on "
        "them; default 2"
    )  # fmt: skip
    command.add_argument("--overwrite", action="store_true", help="replace a report in DST")
    command.set_defaults(run=_report)


def _report(options: dict[str, Any]) -> None:
    print(make_report(ReportConfig(**options), command=_command(options)))


def _command(options: dict[str, Any]) -> str:
    """The command line that has these options, defaults left out."""
    words = ["avar", "report", *options["runs"]]
    for name, value in options.items():
        default: Any = argparse.SUPPRESS if name == "output" else getattr(ReportConfig, name, None)
        if name != "runs" and value != default:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)
