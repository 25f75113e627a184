"""`avar synthesize`: its configuration from a file and from options, and what it prints."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from avar_lightning.errors import OneSentence
from avar_lightning.synthesis import SynthesisConfig, preview, synthesize


class _Parser(OneSentence, ArgumentParser):
    """Says in one sentence what is wrong with a command line or configuration."""


def add_synthesize(commands: Any) -> None:
    """Add the subcommand; its arguments are left to a parser that knows configuration files."""
    command = commands.add_parser(
        "synthesize",
        help="write visual-anchored reflection data with models behind OpenAI-compatible servers",
        prefix_chars="\0",  # so that nothing is taken for an option here
        add_help=False,
    )
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=_synthesize)


def synthesis_parser() -> ArgumentParser:
    """The parser of `avar synthesize`: every field of `SynthesisConfig`, also from `--config FILE`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog="avar synthesize",
        allow_abbrev=False,
        description=(
            "Describe each image, reason from the description, weave returns to the image into the chain, and keep "
            "what passes the filters. An interrupted run goes on when it is called again; no answer is paid twice."
        ),
    )
    parser.add_argument("--config", action="config", help="YAML file with these options; several are laid over it")
    parser.add_class_arguments(SynthesisConfig)
    return parser


def _synthesize(options: dict[str, Any]) -> None:
    parser = synthesis_parser()
    parsed = vars(parser.instantiate_classes(parser.parse_args(options["arguments"])))
    parsed.pop("config", None)
    config = SynthesisConfig(**parsed)
    if config.dry_run:
        print(preview(config))
        return
    report = synthesize(config)
    print(f"{report}\n\nresults  {config.output}")
