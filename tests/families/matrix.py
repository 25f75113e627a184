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
WITHOUT_END = ("LLaVA-1.5", "LLaVA-NeXT")
"""Families whose released template writes no token behind an answer at which generation stops."""
WORDS = {
    ("Llama-3.2-Vision", "guidance"): "yes, self-attention layers",
    ("Llama-3.2-Vision", "roles"): "yes, one token an image",
    **{(name, "training"): "yes, answers without an end" for name in WITHOUT_END},
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
NOTES = """What to know of single families:

- **LLaVA-1.5, LLaVA-NeXT**: the template of the release writes no end token behind an answer (LLaVA-NeXT's writes the
  characters `<\\s>`), so what is fine-tuned with it does not learn to stop. Give the tokenizer a template that ends
  assistant turns with its `eos_token`.
- **Llama-3.2-Vision**: its picture is seen through cross-attention layers, whose keys are no tokens. An image is one
  token, and masses, VAS, guidance and visual rewards are those of the self-attention layers on this token: they say how
  much is read from where the picture stands, and not how much is seen of it. In a batch whose samples have different
  numbers of pictures, or some none, transformers lets tokens in front of a sample's first picture attend to pictures of
  the batch that are not its own; a model loaded by this project hides those, so that a sample is what it is alone. An
  exported model, which has no trace of this project, does as transformers does.
- **Gemma 3**: the template puts the system message into the first user turn. Roles are exact where messages are known
  (all data of this project); from token ids alone (`tag_roles`) that text counts as user.
- **SmolVLM, InternVL, Mistral 3**: what a processor writes between the tokens of an image (names of tiles, line ends)
  counts as user text.
- **Without torchvision**, processors of the Qwen-VL families, LLaVA-OneVision, InternVL, SmolVLM and Mistral 3 load for
  images only, SmolVLM's also without num2words. `AutoProcessor` wants torchvision for them; what they save is meant to
  open with it where that is installed, which could not be tried here.
- **Overlays** of VASCallback are drawn where the place of a token in its image is known: the Qwen-VL families,
  LLaVA-1.5 and Gemma 3.

A family that is not in the table: adapters, freezing and sharding follow what transformers says about the model
(`get_encoder("image")`, `get_decoder()`, `_no_split_modules`); where that is not enough, an error says what to add to
`avar_lightning/families.py`.
"""
