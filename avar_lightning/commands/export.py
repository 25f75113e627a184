"""`avar export`: its options, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from transformers.utils import is_torchvision_available

from avar_lightning.export import ExportConfig, export


def add_export(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "export",
        allow_abbrev=False,
        help="write a Hugging Face folder from any checkpoint",
        description=(
            "Write model, processor, chat template, generation settings, model card and configuration to DST, open it "
            "again and compare every weight's name, shape and dtype. It needs memory for the model once, and no GPU."
        ),
    )
    command.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a .ckpt file, a folder that FSDP wrote, a run's folder (runs/NAME/version_N), a folder or hub name of "
        "Hugging Face, or a folder of adapters",
    )
    command.add_argument("output", metavar="DST", help="folder to write; it is whole or not there")
    command.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add adapters to the full-precision weights (the default), or write them alone",
    )
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: as trained"
    )
    command.add_argument(
        "--pick",
        choices=["auto", "best", "last"],
        default="auto",
        help="which checkpoint of a run; default: the best where a metric was monitored, else the last",
    )
    command.add_argument("--check", action="store_true", help="compare logits before and after too, on the CPU")
    command.add_argument("--overwrite", action="store_true", help="replace an exported model in DST")
    command.set_defaults(run=_export)


def _export(options: dict[str, Any]) -> None:
    done = export(ExportConfig(**options))
    kind = "adapters" if not options["merge"] else "model, adapters merged" if done.merged else "model"
    print(f"{kind}  {done.folder} ({done.parameters:,} parameters)")
    print(
        f"checked  {done.tensors} tensors by name, shape and dtype"
        + ("" if done.difference is None else f", logits within {done.difference:.1g} of the largest")
    )
    if options["merge"]:
        print(f"serve    vllm serve {done.folder}\n         transformers serve {done.folder}")
        if not is_torchvision_available():
            print("         (where torchvision is installed, which many families' AutoProcessor asks for)")
