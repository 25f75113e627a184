"""`avar doctor`: its options, and what it prints."""

from __future__ import annotations

import argparse
import math
from typing import Any

from avar_lightning.doctor import DoctorConfig, diagnose
from avar_lightning.doctor.hardware import DEFAULT_UTILISATION, KNOWN
from avar_lightning.doctor.workload import Given


def add_doctor(commands: Any) -> None:
    """Add the subcommand; its arguments are left to a parser that passes on what `train.py fit` takes."""
    command = commands.add_parser(
        "doctor",
        help="what this machine can run, and the memory and time of a configuration before it is started",
        prefix_chars="\0",  # so that nothing is taken for an option here
        add_help=False,
    )
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=_doctor)


def doctor_parser() -> argparse.ArgumentParser:
    """The parser of `avar doctor`'s own options."""
    parser = argparse.ArgumentParser(
        prog="avar doctor",
        usage="avar doctor [options] [--config FILE ... and whatever else train.py fit takes]",
        allow_abbrev=False,
        description=(
            "Say what this machine can run and what mends the rest. With --config (several are laid over each other, "
            "and single settings over all, as in train.py fit) also estimate memory and time, and whether it fits. "
            "Nothing is started or downloaded except, for a hub name, the model's configuration."
        ),
    )
    names = ", ".join(device.name for device in KNOWN)
    parser.add_argument("--gpu", metavar="NAME", help=f"estimate for this device instead of this machine's: {names}")
    parser.add_argument("--memory", type=_size, metavar="GIB", help="estimate for a device with so much memory")
    parser.add_argument("--devices", type=_count, metavar="N", help="a node; default trainer.devices")
    parser.add_argument("--num-nodes", type=_count, metavar="N", help="default trainer.num_nodes")
    parser.add_argument("--length", type=_count, metavar="TOKENS", help="of the longest sample (GRPO: prompt)")
    parser.add_argument("--mean-length", type=_count, metavar="TOKENS", help="of the mean sample, for the time")
    parser.add_argument("--image-tokens", type=int, metavar="TOKENS", help="of the images of a sample")
    parser.add_argument("--samples", type=_count, metavar="N", help="training samples, for the hours")
    parser.add_argument("--utilisation", type=_share, default=DEFAULT_UTILISATION, metavar="SHARE",
                        help=f"of a device's peak that training reaches; default {DEFAULT_UTILISATION}")  # fmt: skip
    parser.add_argument("--explain", action="store_true", help="everything: all moments and the machine too")
    return parser


def _doctor(options: dict[str, Any]) -> None:
    own, rest = doctor_parser().parse_known_args(options["arguments"])
    given = Given(own.devices, own.num_nodes, own.length, own.mean_length, own.image_tokens, own.samples)
    found = diagnose(DoctorConfig(rest, own.gpu, own.memory, own.utilisation, given, own.explain))
    print(found.text, flush=True)
    if found.problems:
        raise ValueError(" ".join(found.problems))


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GiB, more than 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share in (0, 1]")
    return value
