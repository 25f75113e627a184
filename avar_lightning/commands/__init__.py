"""The `avar` command: what is done with models and shards beside training. One file a subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from avar_lightning.commands.convert import add_convert
from avar_lightning.commands.sweep import add_sweep
from avar_lightning.commands.synthesize import add_synthesize
from avar_lightning.errors import told


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status.

    0 when done, 1 when input or environment is at fault (one sentence on stderr), 2 for wrong usage.
    """
    parser = argparse.ArgumentParser(prog="avar", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_convert, add_sweep, add_synthesize):
        add(commands)
    options = vars(parser.parse_args(args))
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
