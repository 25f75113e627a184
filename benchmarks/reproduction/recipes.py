"""The trainings that findings are made of. A part of the page names those that it needs; each is trained once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from avar_lightning.data.demo import WORLD_VERSION
from avar_lightning.processing import resolve_pretrained
from benchmarks.trainings import ROOT

SFT, GRPO = "configs/avar_sft.yaml", "configs/avar_grpo.yaml"
# Nothing is chosen by validation here, so nothing is validated; what came out is measured on the test split.
UNVALIDATED = ("--trainer.limit_val_batches=0", "--model.init_args.max_new_tokens=0")
SFT_LENGTH = ("--trainer.max_steps=300", "--data.init_args.batch_size=8")
GRPO_LENGTH = ("--trainer.max_steps=20", "--data.init_args.batch_size=12")
NOT_OF_THE_RESULT = ("logger", "callbacks", "log_every_n_steps", "accelerator")


@dataclass(frozen=True)
class Training:
    """One way to train; with a seed it is a run of `train.py fit`."""

    name: str
    title: str
    config: str
    options: tuple[str, ...]
    start: str | Training = "demo"
    """The model that training starts from: one that ships, or what another training made of the same seed."""

    def folder(self, root: Path, seed: int) -> Path:
        """Where the run lies; another recipe, world or starting model has another folder."""
        known: list[Any] = [recipe_of(self.config), self.options, WORLD_VERSION, self._identity(root, seed)]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        return root / self.name / f"seed_{seed}_{digest[:8]}"

    def start_folder(self, root: Path, seed: int) -> str:
        """The model that a run of this seed starts from, as `vlm.pretrained` takes it."""
        return self.start if isinstance(self.start, str) else str(self.start.folder(root, seed) / "hf")

    def _identity(self, root: Path, seed: int) -> str:
        if not isinstance(self.start, str):
            return self.start.folder(root, seed).name
        return shipped_digest(self.start)

    def before(self) -> list[Training]:
        """This training behind those that it goes on from."""
        return [self] if isinstance(self.start, str) else [*self.start.before(), self]


@cache
def shipped_digest(name: str) -> str:
    """Of the weights of a model that ships."""
    return hashlib.sha256((Path(resolve_pretrained(name)) / "model.safetensors").read_bytes()).hexdigest()


@cache
def recipe_of(config: str) -> dict[str, Any]:
    """What of a configuration decides the result."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / config).read_text())
    for name in NOT_OF_THE_RESULT:
        recipe["trainer"].pop(name, None)
    return recipe


def _sft(name: str, title: str, *options: str, start: str = "demo") -> Training:
    return Training(name, title, SFT, (*UNVALIDATED, *SFT_LENGTH, *options), start)


def _guided(
    name: str, title: str, form: str, queries: str = "response", *options: str, start: str = "demo"
) -> Training:
    guidance = f"--model.init_args.guidance.form={form}", f"--model.init_args.guidance.queries=[{queries}]"
    return _sft(name, title, *guidance, *options, start=start)


def _style(name: str, title: str, style: str, *options: str, start: str = "demo") -> Training:
    return _guided(name, title, "none", "response", f"--data.init_args.style={style}", *options, start=start)


def _grpo(name: str, title: str, visual: str, start: str | Training) -> Training:
    wanted = "null" if visual == "none" else visual
    option = f"--model.init_args.visual{'' if visual == 'none' else '.transform'}={wanted}"
    return Training(name, title, GRPO, (*UNVALIDATED, *GRPO_LENGTH, option), start)


# Cold starts by data
DIRECT = _style("direct", "answers at once", "direct")
MULTIMODAL = _style("multimodal", "multimodal cold start", "reasoned")
TEXT_ONLY = _style("text_only", "text-only cold start", "reasoned", "--data.init_args.train_pictures=false")
ANCHORED = _style("anchored", "anchored cold start", "anchored")
MIXED = _style("mixed", "cold start on mixed styles", "mixed")
# Guidance
LAYERS = "--model.init_args.guidance.layers"
CONTROLLER = (
    "--trainer.callbacks+=avar_lightning.callbacks.GuidanceController",
    "--trainer.callbacks.init_args.target=4",
)
WEAK = ("--model.init_args.guidance.alpha=0.015", "--model.init_args.guidance.beta=0.015")
HINGE_T = _guided("hinge_T", "hinge, Q = T", "hinge")
HINGE_U = _guided("hinge_U", "hinge, Q = U", "hinge", "user")
HINGE_UT = _guided("hinge_UT", "hinge, Q = U∪T", "hinge", "user,response")
SHARE_T = _guided("share_T", "share, Q = T", "share")
PUBLISHED_U = _guided("published_U", "published, Q = U", "published", "user")
PUBLISHED_T = _guided("published_T", "published, Q = T", "published")
PUBLISHED_WEAK = _guided("published_T_weak", "published, Q = T, a tenth of the weight", "published", "response", *WEAK)
HINGE_LOWER = _guided("hinge_lower", "hinge, Q = T, layers 0 and 1", "hinge", "response", f"{LAYERS}=[0,1]")
HINGE_UPPER = _guided("hinge_upper", "hinge, Q = T, layers 2 and 3", "hinge", "response", f"{LAYERS}=[2,3]")
CONTROLLED = _guided("controlled", "published, Q = T, held at VAS 4", "published", "response", *CONTROLLER)
GUIDED = [
    *(HINGE_T, HINGE_U, HINGE_UT, SHARE_T, PUBLISHED_U, PUBLISHED_T, PUBLISHED_WEAK),
    *(HINGE_LOWER, HINGE_UPPER, CONTROLLED),
]
# A smaller model
SMALL = _style("small_anchored", "small model, anchored cold start", "anchored", start="demo_small")
SMALL_GUIDED = _guided("small_hinge_T", "small model, hinge, Q = T", "hinge", start="demo_small")
# Reinforcement learning: from a cold start on mixed styles, which leaves something to choose, and from the guided one
REWARDS = {
    "none": _grpo("grpo", "GRPO", "none", MIXED),
    "ratio": _grpo("vars_ratio", "GRPO + VARS, ratio", "ratio", MIXED),
    "log": _grpo("vars_log", "GRPO + VARS, log", "log", MIXED),
    "share": _grpo("vars_share", "GRPO + VARS, share", "share", MIXED),
    "tanh": _grpo("vars_tanh", "GRPO + VARS, tanh", "tanh", MIXED),
}
GUIDED_GRPO = _grpo("guided_grpo", "+ GRPO without VARS", "none", HINGE_T)
GUIDED_VARS = _grpo("guided_vars", "+ VARS", "share", HINGE_T)
