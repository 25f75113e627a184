"""Sweep strengths of steering over a set of prompts, and say what each did: `avar sweep`.

Answers are kept as they come, one JSON line a sample, so that an interrupted sweep goes on where it stopped and a
larger grid adds to a smaller one. Table and pictures are made from them at the end.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from avar_lightning.attention import MODES, find_vlm, select_layers
from avar_lightning.data import ShardDataModule, find_shards
from avar_lightning.files import drop_half_line, json_line, whole_lines, write_json
from avar_lightning.interventions import METRICS, UNSTEERED, Setting, answer, columns_of, compare, grid, prompt_of
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import load_processor, padding_id, resolve_pretrained
from avar_lightning.report import interventions_table, plot_differences, plot_sweep
from avar_lightning.sft import SFTModule

ANSWERS, ABOUT = "answers.jsonl", "sweep.json"
# Columns of a difference in the CSV, where the metric's own mean stands beside them.
NAMES = {"mean": "difference", "low": "low", "high": "high", "num_pairs": "num_pairs"}
PICTURES = {
    "accuracy": "Accuracy (%)",
    "vas_ratio_of_means": "VAS of user tokens (ratio of means)",
    "vas_ratio_of_means_response": "VAS of answers (ratio of means)",
}


@dataclass
class SweepConfig:
    """What to sweep, on what, and how answers are made."""

    models: list[str]
    """Hugging Face folders or names, `"demo"`, or Lightning checkpoints of `SFTModule`; swept one after the other."""
    shards: str
    """WebDataset shards of prompts with answers, as `ShardDataModule` takes them."""
    output: str
    """Folder of the results."""
    image: tuple[float, ...] = (0.0, 0.15, 0.3)
    """Strengths on image tokens."""
    system: tuple[float, ...] = (0.0, 0.05, 0.4, 0.6)
    """Strengths on system tokens."""
    mode: tuple[str, ...] = ("logit",)
    """Of `attention.MODES`."""
    queries: tuple[int, ...] | str | None = None
    """Roles of the rows that are steered, `"last"`, or every row."""
    layers: str | None = None
    """Layers that are steered, `"9-14"` or `"0.3-0.5"`; every layer when unset."""
    max_new_tokens: int = 256
    """Longest answer."""
    batch_size: int = 8
    """Prompts answered together."""
    max_samples: int | None = None
    """Only this many samples, from the first; all when unset."""
    attn_implementation: str = "sdpa"
    """Attention kernel of transformers."""
    dtype: str = "auto"
    """Of the weights; bfloat16 on CUDA and float32 elsewhere under `auto`."""
    device: str = "auto"
    """CUDA where there is one, under `auto`."""
    overwrite: bool = False
    """Delete another sweep's answers in `output`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be swept."""
        for name in ("max_new_tokens", "batch_size", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1.")
        if unknown := [mode for mode in self.mode if mode not in MODES]:
            raise ValueError(f"mode is {unknown[0]!r}, expected some of {', '.join(MODES)}.")
        if not self.models:
            raise ValueError("models is empty, expected at least one folder, name or checkpoint.")

    @property
    def settings(self) -> list[Setting]:
        """Every combination, unsteered first."""
        settings = grid(self.image, self.system, self.mode, queries=self.queries, layers=self.layers)
        if not settings:
            raise ValueError("image and system hold nothing but 0, which steers nothing; give other strengths.")
        return [UNSTEERED, *settings]

    @property
    def device_name(self) -> str:
        """The device, `auto` resolved."""
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype_name(self) -> str:
        """The dtype, `auto` resolved."""
        return self.dtype if self.dtype != "auto" else "bfloat16" if self.device_name.startswith("cuda") else "float32"

    @property
    def about(self) -> dict[str, Any]:
        """What answers must have in common to stand beside each other; the grid may grow."""
        names = ("models", "shards", "queries", "layers", "max_new_tokens", "max_samples", "attn_implementation")
        known = {name: getattr(self, name) for name in names}
        known |= {"device": self.device_name, "dtype": self.dtype_name, "decoding": "greedy"}
        known["weights"] = [_stamp(_files_of(name)) for name in self.models]
        known["data"] = _stamp([Path(shard.url) for shard in find_shards(self.shards)])
        return dict(json.loads(json.dumps(known)))


def sweep(config: SweepConfig) -> dict[str, dict[str, Any]]:
    """Answer every prompt under every setting with every model, and write what came of it to `config.output`.

    Written: `answers.jsonl`, `results.csv`, `results.md`, and the pictures `accuracy.png`,
    `vas_ratio_of_means.png`, `vas_ratio_of_means_response.png` and `differences.png`.

    Args:
        config: What to sweep; a second call with a larger grid adds to the first.

    Returns:
        By setting, what `interventions.compare` gives.

    Raises:
        ValueError: The folder holds another sweep's answers, or no setting steers.
        FileNotFoundError: No such model or shards.
    """
    settings, about = config.settings, config.about
    first = _load(config.models[0], config)
    # Before anything is written, and before anything is answered.
    select_layers(config.layers, find_vlm(first[0]).config.get_text_config().num_hidden_layers)
    folder = Path(config.output)
    answers = _open_answers(folder, about, overwrite=config.overwrite)
    with (folder / ANSWERS).open("a") as file:
        for name in config.models:
            model, processor = first if name == config.models[0] else _load(name, config)
            _answer_all(name, model, processor, config, settings, answers, file)
    rows = {setting.name: [_rows(answers, model, setting.name) for model in config.models] for setting in settings}
    results = {name: compare(rows[UNSTEERED.name], after) for name, after in rows.items()}
    _write(folder, settings, results)
    return results


def _answer_all(
    name: str,
    model: Any,
    processor: Any,
    config: SweepConfig,
    settings: Sequence[Setting],
    answers: dict[tuple[str, str, int], Any],
    file: IO[str],
) -> None:
    """Answer what is missing of one model, batch by batch, each under every setting."""
    data = ShardDataModule(predict=config.shards, processor=processor, batch_size=config.batch_size, num_workers=0)
    loader = data.predict_dataloader()
    pad_token_id = padding_id(processor)
    start, total = 0, _length(loader, config)
    with tqdm(
        total=None if total is None else total * len(settings), desc="/".join(Path(name).parts[-2:]), unit="batch"
    ) as bar:
        for batch in loader:
            if config.max_samples is not None and start >= config.max_samples:
                break
            prompt = prompt_of(batch, batch["role_ids"], model, pad_token_id)
            prompt = {name: value.to(model.device) for name, value in prompt.items()}
            prompt = {name: v.to(model.dtype) if v.is_floating_point() else v for name, v in prompt.items()}
            columns = columns_of(batch, batch["role_ids"], processor)
            wanted = len(columns) if config.max_samples is None else min(len(columns), config.max_samples - start)
            for setting in settings:
                bar.set_postfix_str(setting.name)
                missing = any((name, setting.name, start + i) not in answers for i in range(wanted))
                if missing:
                    made = answer(
                        model,
                        prompt,
                        setting,
                        processor=processor,
                        max_new_tokens=config.max_new_tokens,
                        columns=columns,
                    )
                    for offset, row in enumerate(made[:wanted]):
                        line = {"model": name, "setting": setting.name, "sample": start + offset} | row
                        answers[name, setting.name, start + offset] = line
                        file.write(json_line(line))
                    file.flush()
                bar.update()
            start += len(columns)


def _length(loader: Any, config: SweepConfig) -> int | None:
    try:
        batches = len(loader)
    except TypeError:
        return None
    wanted = math.inf if config.max_samples is None else math.ceil(config.max_samples / config.batch_size)
    return int(min(batches, wanted))


def _load(name: str, config: SweepConfig) -> tuple[Any, Any]:
    """Model, on its device, and processor of a folder, a name or a checkpoint."""
    dtype = config.dtype_name
    if name.endswith(".ckpt"):
        module = SFTModule.load_from_checkpoint(name, map_location="cpu")
        find_vlm(module).set_attn_implementation({"text_config": config.attn_implementation})
        checkpoint: Any = module.model
        return checkpoint.to(config.device_name, getattr(torch, dtype)).eval(), module.processor
    options: Any = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    model: Any = load_model(VLMConfig(name, **options))
    return model.to(config.device_name).eval(), load_processor(name)


def _open_answers(folder: Path, now: dict[str, Any], *, overwrite: bool) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Answers of an earlier, interrupted or smaller sweep of the same kind; a folder for a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    about, answers = folder / ABOUT, folder / ANSWERS
    if overwrite or not about.is_file():
        answers.unlink(missing_ok=True)
        write_json(about, now)
        return {}
    before = json.loads(about.read_text())
    other = [name for name, value in now.items() if before.get(name) != value]
    if other:
        raise ValueError(
            f"{folder} holds a sweep with other {', '.join(other)} ({before.get(other[0])!r}), expected "
            f"{now[other[0]]!r}; give another folder, or --overwrite."
        )
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    if answers.is_file():
        drop_half_line(answers)
        for line in whole_lines(answers):
            row: dict[str, Any] = json.loads(line)
            row |= {name: math.nan for name in METRICS if row[name] is None}
            found[row["model"], row["setting"], row["sample"]] = row
    return found


def _rows(answers: Mapping[tuple[str, str, int], Any], model: str, setting: str) -> list[dict[str, Any]]:
    """A model's answers under a setting, in the order of the samples."""
    return [answers[key] for key in sorted(key for key in answers if key[:2] == (model, setting))]


def _write(folder: Path, settings: Sequence[Setting], results: Mapping[str, Mapping[str, Any]]) -> None:
    table = []
    for setting in settings:
        result, steered = results[setting.name], setting.intervention
        row: dict[str, Any] = {"setting": setting.name}
        row |= {name: "" if steered is None else getattr(steered, name) for name in ("mode", "image", "system")}
        for metric in METRICS:
            difference = result[f"{metric}_difference"]
            row |= {metric: result[metric], f"{metric}_sd_of_models": result[f"{metric}_sd"]}
            row |= {f"{metric}_{NAMES[name]}": value for name, value in asdict(difference).items()}
            row[f"{metric}_significant"] = difference.significant
        table.append(row)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    (folder / "results.md").write_text(interventions_table(results) + "\n")
    steered_rows = [vars(s.intervention) | dict(results[s.name]) for s in settings if s.intervention is not None]
    for metric, title in PICTURES.items():
        figure = plot_sweep(steered_rows, metric, reference=results[UNSTEERED.name][metric], title=title)
        figure.savefig(folder / f"{metric}.png", dpi=150)
    plot_differences(results).savefig(folder / "differences.png", dpi=150)


def _files_of(name: str) -> list[Path]:
    """A local model's weights, which tell one training's answers from another's."""
    path = Path(name if name.endswith(".ckpt") else resolve_pretrained(name))
    if name.endswith(".ckpt") and not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {name!r}; check the path.")
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def _stamp(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and time of local files."""
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
