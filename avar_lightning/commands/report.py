"""`avar report`: its options, and what it prints."""

from __future__ import annotations

import shlex
from typing import Any

from avar_lightning.run_report import TITLE, make_report


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
    told = "folder of a run (runs/NAME/version_N), a vas/ folder or one vas/step_*.json of VASCallback, or of a sweep"
    command.add_argument("runs", nargs="+", metavar="RUN", help=told)
    command.add_argument("--output", required=True, metavar="DST", help="folder to write; it is whole or not there")
    command.add_argument("--title", default=TITLE, help="of the page")
    told = "drawn against VAS; default val/accuracy"
    command.add_argument("--accuracy", default="val/accuracy", metavar="METRIC", help=told)
    told = "runs that get a section of their own, the first ones; default 8"
    command.add_argument("--each", type=int, default=8, metavar="N", help=told)
    told = "images a run with the attention on them; default 2"
    command.add_argument("--overlays", type=int, default=2, metavar="N", help=told)
    command.add_argument("--overwrite", action="store_true", help="replace a report in DST")
    command.set_defaults(run=lambda options: print(make_report(**options, command=_command(command, options))))


def _command(parser: Any, options: dict[str, Any]) -> str:
    """The command line that has these options, defaults left out."""
    words = ["avar", "report", *options["runs"]]
    for name, value in options.items():
        if name != "runs" and value != parser.get_default(name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)
