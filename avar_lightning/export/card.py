"""The model card of an exported model: what it was made from, how, what was measured, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MEASURES = {
    "val/accuracy": "accuracy",
    "val/vas": "VAS, user tokens",
    "val/vas_response": "VAS, response tokens",
    "val/vas_ratio_of_means_response": "VAS, response tokens (ratio of means)",
    "val/image_share_response": "image share of attention, response tokens",
    "reward/total": "mean reward",
    "val/loss": "LM loss",
}

CITATION = """@inproceedings{luo2026avar,
  title         = {From Narrow to Panoramic Vision: Attention-Guided Cold-Start Reshapes Multimodal Reasoning},
  author        = {Luo, Ruilin and others},
  booktitle     = {International Conference on Learning Representations},
  year          = {2026},
  eprint        = {2603.03825},
  archivePrefix = {arXiv}
}"""


def model_card(name: str, *, base: str, adapters: bool, run: Path | None, settings: Mapping[str, Any]) -> str:
    """A README.md for Hugging Face.

    Args:
        name: Title.
        base: Folder or hub name of the model that training began with.
        adapters: Whether the folder holds adapters and not a whole model.
        run: Folder of the training run, for its measurements.
        settings: Configuration of the training module, as checkpoints keep it.
    """
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    base = base if on_hub else Path(base).name
    metadata: dict[str, Any] = {"library_name": "peft" if adapters else "transformers"}
    metadata |= {"pipeline_tag": "image-text-to-text", "tags": ["visual-attention", "avar", "pytorch-lightning"]}
    if on_hub:
        metadata |= {"base_model": base, "base_model_relation": "adapter" if adapters else "finetune"}
    what = "Adapters (PEFT) for" if adapters else "Fine-tuned from"
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name}\n\n{what} `{base}` with avar_lightning: {_method(settings)}.",
        *_measured(run),
        *_settings(settings, run),
        _usage(base, adapters),
        f"## Citation\n\nThe Visual Attention Score and its use in training are AVAR's:\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _method(settings: Mapping[str, Any]) -> str:
    if "grpo" in settings:
        visual = settings.get("visual")
        return f"GRPO with a visual reward ({visual['transform']}, weight {visual['weight']:g})" if visual else "GRPO"
    guidance = settings.get("guidance")
    if guidance and guidance.get("form") != "none":
        return f"supervised fine-tuning with attention guidance ({guidance['form']})"
    return "supervised fine-tuning" if settings else "exported as it is"


def _measured(run: Path | None) -> list[str]:
    """A table of what the run measured, before and after; nothing where it measured nothing."""
    values = _summary(run) if run is not None else {}
    before, after = values.get("before") or {}, values.get("after") or {}
    rows = [
        f"| {label} | {_number(before.get(name))} | {_number(after.get(name))} |"
        for name, label in MEASURES.items()
        if after.get(name) is not None
    ]
    if not rows:
        return []
    steps = f" after {values['steps']} updates" if "steps" in values else ""
    head = f"## Measurements\n\nOn the run's validation data{steps}.\n\n| | before | after |\n|---|---|---|"
    return ["\n".join([head, *rows])]


def _settings(settings: Mapping[str, Any], run: Path | None) -> list[str]:
    if not settings:
        return []
    whole = "\n\nThe whole configuration of the run is in `config.yaml`."
    known = run is not None and (run / "config.yaml").is_file()
    written = yaml.safe_dump(_plain(settings), sort_keys=False)
    return [f"## Settings\n\n```yaml\n{written}```{whole if known else ''}"]


def _summary(run: Path) -> dict[str, Any]:
    """What the run says of itself at its end; of one that has not ended what VASCallback wrote so far."""
    if (run / "summary.json").is_file():
        found: dict[str, Any] = json.loads((run / "summary.json").read_text())
        return found
    steps = [json.loads(path.read_text()) for path in sorted((run / "vas").glob("step_*.json"))]
    if not steps:
        return {}
    first: dict[str, Any] = next((step["metrics"] for step in steps if step["baseline"]), {})
    return {"before": first, "after": steps[-1]["metrics"], "steps": steps[-1]["step"]}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is unset and where files of the author lie, in types that YAML writes."""
    kept = {name: value for name, value in settings.items() if value is not None}
    found: dict[str, Any] = _without_paths(json.loads(json.dumps(kept, default=str)))
    return found


def _without_paths(value: Any) -> Any:
    """The same with names for absolute paths."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _usage(base: str, adapters: bool) -> str:
    if adapters:
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'base = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "DIRECTORY")'
        )
        serve = "Merge it to serve it: `avar export DIRECTORY MERGED`, then `vllm serve MERGED`."
    else:
        load = (
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            'model = AutoModelForImageTextToText.from_pretrained("DIRECTORY", dtype="auto")'
        )
        serve = "`vllm serve DIRECTORY` or `transformers serve DIRECTORY`."
    return (
        f'## Use\n\n```python\n{load}\nprocessor = AutoProcessor.from_pretrained("DIRECTORY")\n```\n\n{serve} '
        "Processors of families that also read videos need torchvision. The system prompt of the training data belongs "
        "to the model: give the same one."
    )
