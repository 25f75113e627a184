"""The table of docs/families.md, from the outcomes of a run; what holds only in part says so in words."""

from __future__ import annotations

import datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.families.small import FAMILIES

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
CAPABILITIES = {
    "roles": "every token has its role; as many image tokens as the model fills with features",
    "batches": "a sample's loss and VAS are the same alone and beside others, padded on either side",
    "guidance": "loss and gradients of the published form under SDPA are those of eager attention, float64",
    "training": "guided SFT from shards through L.Trainer, VASCallback in validation, gradient checkpointing",
    "generation": "greedy answers with a cache are those without; no image placeholder is sampled",
    "GRPO": "rollouts, visual reward and an update; log-probabilities are those of single eager forwards",
    "LoRA": "adapters in the language model only; vision tower and projector freeze by name",
    "export": "the folder opens with transformers' auto classes, logits equal",
}
WORDS = {
    ("Llama-3.2-Vision", "guidance"): "yes, self-attention layers",
    ("Llama-3.2-Vision", "roles"): "yes, one token an image",
}
"""What a passed test means where it means less, or something else, than in other families."""


class Matrix:
    """Collects outcomes, and writes the document where all tests of the package ran."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], list[bool]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        marker = item.get_closest_marker("capability")
        if marker and (report.when == "call" or report.failed):
            cell = item.callspec.params["family"], marker.args[0]
            self.outcomes.setdefault(cell, []).append(report.passed)
        return report

    def pytest_sessionfinish(self) -> None:
        missing = [(name, what) for name in FAMILIES for what in CAPABILITIES if (name, what) not in self.outcomes]
        if missing:
            raise pytest.UsageError(f"--write-matrix: no test ran for {missing[:3]} …, expected all; add -m ''")
        DOCUMENT.write_text(render(self.outcomes))


def render(outcomes: dict[tuple[str, str], list[bool]]) -> str:
    def cell(name: str, what: str) -> str:
        return WORDS.get((name, what), "yes") if all(outcomes[name, what]) else "**no**"

    rows = [f"| {name} | {' | '.join(cell(name, what) for what in CAPABILITIES)} |" for name in FAMILIES]
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "lightning", "peft"))
    lines = [
        INTRODUCTION,
        f"Written by `make families` on {datetime.date.today().isoformat()}: {packages}, float32 and float64 on a CPU.",
        "",
        f"| family | {' | '.join(CAPABILITIES)} |",
        f"|---|{'---|' * len(CAPABILITIES)}",
        *rows,
        "",
        "What a column means:",
        "",
        *(f"- **{name}**: {text}" for name, text in CAPABILITIES.items()),
        "",
        NOTES,
    ]
    return "\n".join(lines)


INTRODUCTION = """# Model families

Which families of vision-language models work with what, tried on their real classes of transformers with small random
weights, their real processors (PIL images, no torchvision) and small tokenizers with the special tokens and the chat
format of each release. What differs between families is in one table, `avar_lightning/families.py`.
"""
NOTES = ""
