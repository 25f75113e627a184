"""The `avar` command: what is done with models and shards beside training. One file a subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from avar_lightning.errors import told

COMMANDS = ("convert", "synthesize", "sweep", "export", "report", "doctor")


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status.

    0 when done, 1 when input or environment is at fault (one sentence on stderr), 2 for wrong usage.
    """
    parser = argparse.ArgumentParser(prog="avar", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = list(sys.argv[1:] if args is None else args)
    # Only the one that is called: others take seconds to import.
    for name in given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS:
        getattr(import_module(f"{__name__}.{name}"), f"add_{name}")(commands)
    options = vars(parser.parse_args(given))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options.pop("command")
    run: Callable[[dict[str, Any]], None] = options.pop("run")
    try:
        run(options)
    except KeyboardInterrupt:
        print("interrupted; call the same command again to go on.", file=sys.stderr)
        return 130
    except Exception as error:
        if not told(error):
            raise
        return 1
    return 0
