"""Finding 3: steering attention at inference, over strengths, against heads drawn at random."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipes import ANCHORED
from results import Results
from testing import MAX_NEW_TOKENS, NUM_SAMPLES, result_path
from tqdm import tqdm
from training import is_finished, run, threads_of

from avar_lightning.interventions import compare
from avar_lightning.report import interventions_table, plot_sweep

NEEDS = [ANCHORED]
IMAGE, SYSTEM = (0.0, 0.15, 0.3), (0.0, 0.05, 0.4, 0.6)
PAPER = (0.15, 0.4)  # strengths on image and system of the control
RANDOM_DRAWS = 5


def measure(results: Results, *, jobs: int) -> None:
    """Answer the test questions with each trained model under each setting, with InterventionCallback."""
    wanted = {"grid": _grid, "heads": _heads}
    models = [ANCHORED.folder(results.root, seed) / "hf" for seed in results.seeds]
    todo = [
        (model, name)
        for model in models
        if is_finished(model.parent) and result_path(model).is_file()
        for name in wanted
        if not _written(model, name).is_file()
    ]
    with (
        tqdm(total=len(todo), desc="interventions", unit="run", disable=not todo) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):

        def one(job: tuple[Path, str]) -> None:
            model, name = job
            command = [sys.executable, *command_of(model, name, wanted[name](model))]
            run(
                command,
                results.root / "logs" / f"interventions_{model.parent.name}_{name}.log",
                threads=threads_of(jobs),
            )
            bar.update()

        list(pool.map(one, todo))


def command_of(model: Path, name: str, options: Sequence[str]) -> list[str]:
    """What `train.py` is called with."""
    callback = "--trainer.callbacks.init_args"
    return [
        *("train.py", "test", "--config", "configs/avar_sft.yaml"),
        f"--model.init_args.vlm.pretrained={model}",
        "--model.init_args.max_new_tokens=0",
        f"--data.init_args.num_test={NUM_SAMPLES}",
        f"--trainer.logger.init_args.save_dir={model.parent}",
        "--trainer.logger.init_args.name=steering",
        f"--trainer.logger.init_args.version={name}",
        "--trainer.callbacks+=avar_lightning.callbacks.InterventionCallback",
        *(f"{callback}.{option}" for option in options),
        f"{callback}.max_new_tokens={MAX_NEW_TOKENS}",
    ]


def _written(model: Path, name: str) -> Path:
    return model.parent / "steering" / name / "interventions" / "test_step_00000000.json"


def _grid(model: Path) -> list[str]:
    return [f"image={list(IMAGE)}", f"system={list(SYSTEM)}", "mode=logit"]


def _heads(model: Path) -> list[str]:
    """Half of the heads: those of the highest VAS on validation references, which no answer was asked for."""
    scores = json.loads(result_path(model).read_text())["validation_map"]
    ranked = sorted(((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)))
    chosen: dict[int, list[int]] = {}
    for _, layer, head in ranked[len(ranked) // 2 :]:
        chosen.setdefault(layer, []).append(head)
    heads = {layer: sorted(chosen[layer]) for layer in sorted(chosen)}
    image, system = PAPER
    return [f"image={image}", f"system={system}", f"heads={json.dumps(heads)}", "ablation=random_heads",
            f"num_random={RANDOM_DRAWS}"]  # fmt: skip


def write(results: Results, output: Path) -> str:
    """Paired differences over questions, all models together."""
    models = [ANCHORED.folder(results.root, seed) / "hf" for seed in results.seeds]
    parts = []
    for name, words in (("grid", "Every head, logits scaled (the paper's form)"), ("heads", "Heads")):
        found = [json.loads(_written(model, name).read_text()) for model in models if _written(model, name).is_file()]
        if not found:
            continue
        rows = {setting: [each["settings"][setting]["samples"] for each in found] for setting in found[0]["settings"]}
        for samples in (row for each in rows.values() for model in each for row in model):
            samples |= {key: float("nan") for key, value in samples.items() if value is None and key != "id"}
        before = rows["unsteered"]
        compared = {setting: compare(before, after) for setting, after in rows.items()}
        parts += [f"### {words}", f"{len(found)} models, {len(before[0])} questions.", interventions_table(compared)]
        if name == "grid":
            _draw(found[0], compared, output)
            parts.append("![Accuracy over strengths](results/reproduction/steering.png)")
    return "\n\n".join(parts)


def _draw(report: dict[str, Any], compared: dict[str, Any], output: Path) -> None:
    steered = {name: each["intervention"] for name, each in report["settings"].items() if each["intervention"]}
    rows = [steered[name] | compared[name] for name in steered]
    reference = compared["unsteered"]["accuracy"]
    plot_sweep(rows, "accuracy", reference=reference, title="Accuracy (%)").savefig(output / "steering.png", dpi=150)
