"""Finding 3: steering attention at inference, over strengths, against heads drawn at random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from avar_lightning.report import markdown_table, plot_sweep
from benchmarks.reproduction.differences import Interval, crossed, marked
from benchmarks.reproduction.recipes import ANCHORED
from benchmarks.reproduction.results import Results
from benchmarks.reproduction.testing import MAX_NEW_TOKENS, NUM_SAMPLES, SETTINGS, result_path
from benchmarks.reproduction.training import is_finished
from benchmarks.trainings import run, threads_of

NEEDS = [ANCHORED]
IMAGE, SYSTEM = (0.0, 0.15, 0.3), (0.0, 0.05, 0.4, 0.6)
PRIMARY = "logit image=0.15 system=0.4"
"""The paper's setting, and the one comparison that was named before anything was measured."""
CHOSEN_SHARE = 4  # a quarter of the heads
RANDOM_DRAWS = 5


def measure(results: Results, *, jobs: int) -> None:
    """Answer the test questions with each trained model under each setting, with InterventionCallback."""
    todo = []
    for seed in results.seeds:
        model = ANCHORED.folder(results.root, seed) / "hf"
        if is_finished(model.parent) and result_path(model).is_file():
            for name, options in settings_of(model, seed).items():
                if not _written(model, name, options).is_file():
                    todo.append(partial(_run, results.root, model, name, options, threads_of(jobs)))
    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(lambda job: job(), todo), total=len(todo), desc="interventions", disable=not todo))


def settings_of(model: Path, seed: int) -> dict[str, list[str]]:
    """Arguments of InterventionCallback: the grid, and a quarter of the heads against others drawn at random.

    Chosen are the heads of the highest VAS on validation references, for which nobody was asked anything.
    """
    scores = json.loads(result_path(model).read_text())["validation_map"]
    ranked = sorted(((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)))
    chosen: dict[int, list[int]] = {}
    for _, layer, head in ranked[-(len(ranked) // CHOSEN_SHARE) :]:
        chosen.setdefault(layer, []).append(head)
    heads = json.dumps({layer: sorted(chosen[layer]) for layer in sorted(chosen)})
    control = ["ablation=random_heads", f"heads={heads}", f"num_random={RANDOM_DRAWS}", f"seed={seed}", "image=0.15"]
    return {
        "grid": [f"image={list(IMAGE)}", f"system={list(SYSTEM)}", "mode=logit"],
        "heads": [*control, "system=0.4"],
    }


def command_of(model: Path, version: str, options: Sequence[str]) -> list[str]:
    """What `train.py` is called with."""
    callback = "--trainer.callbacks.init_args"
    return [
        *("train.py", "test", "--config", "configs/avar_sft.yaml"),
        f"--model.init_args.vlm.pretrained={model}",
        "--model.init_args.max_new_tokens=0",
        f"--data.init_args.num_test={NUM_SAMPLES}",
        f"--trainer.logger.init_args.save_dir={model.parent}",
        "--trainer.logger.init_args.name=steering",
        f"--trainer.logger.init_args.version={version}",
        "--trainer.callbacks+=avar_lightning.callbacks.InterventionCallback",
        *(f"{callback}.{option}" for option in options),
        f"{callback}.max_new_tokens={MAX_NEW_TOKENS}",
    ]


def _version(name: str, options: Sequence[str]) -> str:
    return f"{name}_{hashlib.sha256(json.dumps([SETTINGS, list(options)]).encode()).hexdigest()[:8]}"


def _written(model: Path, name: str, options: Sequence[str]) -> Path:
    return model.parent / "steering" / _version(name, options) / "interventions" / "test_step_00000000.json"


def _run(root: Path, model: Path, name: str, options: Sequence[str], threads: int) -> None:
    log = root / "logs" / f"steering_{model.parent.name}_{name}.log"
    run(command_of(model, _version(name, options), options), log, threads=threads)


def write(results: Results, output: Path) -> str:
    """Accuracy under each setting, with differences over seeds and questions."""
    found: dict[str, list[dict[str, Any]]] = {"grid": [], "heads": []}
    for seed in results.seeds:
        model = ANCHORED.folder(results.root, seed) / "hf"
        if result_path(model).is_file():
            for name, options in settings_of(model, seed).items():
                path = _written(model, name, options)
                if path.is_file():
                    found[name].append(json.loads(path.read_text())["settings"])
    parts = []
    if found["grid"]:
        parts += ["### Every head", _grid(found["grid"], output)]
        parts.append("![Accuracy over strengths](results/reproduction/steering.png)")
    if found["heads"]:
        parts += ["### A quarter of the heads, against others drawn at random", _heads(found["heads"])]
    return "\n\n".join(parts) or "Not finished."


def _grid(reports: list[dict[str, Any]], output: Path) -> str:
    before = _column(reports, "unsteered", "accuracy")
    gains = {name: crossed(before, _column(reports, name, "accuracy")) for name in reports[0] if name != "unsteered"}
    rows = [["unsteered", f"{100 * before.mean():.1f}", "", f"{_vas(reports, 'unsteered'):.2f}"]]
    texts = marked([gains[PRIMARY]], "+.1f") + marked([gains[name] for name in gains if name != PRIMARY], "+.1f")
    for name, text in zip([PRIMARY, *(name for name in gains if name != PRIMARY)], texts, strict=True):
        label = f"**{name}** (named before)" if name == PRIMARY else name
        after = _column(reports, name, "accuracy")
        rows.append([label, f"{100 * after.mean():.1f}", text, f"{_vas(reports, name):.2f}"])
    drawn = [
        reports[0][name]["intervention"]
        | {"accuracy": _column(reports, name, "accuracy").mean(), "accuracy_difference": gain}
        for name, gain in gains.items()
    ]
    plot_sweep(drawn, "accuracy", reference=float(before.mean()), title="Accuracy (%)").savefig(
        output / "steering.png", dpi=150
    )
    headings = ["setting", "accuracy (%)", "change, points", "VAS of answers (ratio of means)"]
    return f"{len(reports)} models, {before.shape[1]} questions.\n\n{markdown_table(headings, rows)}"


def _heads(reports: list[dict[str, Any]]) -> str:
    before, chosen = (_column(reports, name, "accuracy") for name in ("unsteered", "chosen heads"))
    draws = np.mean([_column(reports, name, "accuracy") for name in reports[0] if name.startswith("random")], axis=0)
    family: dict[str, Interval] = {
        "chosen heads against unsteered": crossed(before, chosen),
        "random heads (mean of draws) against unsteered": crossed(before, draws),
        "chosen heads against random heads": crossed(draws, chosen),
    }
    rows = [[name, text] for name, text in zip(family, marked(list(family.values()), "+.1f"), strict=True)]
    return markdown_table(["image 0.15, system 0.4", "accuracy, points"], rows)


def _column(reports: list[dict[str, Any]], setting: str, name: str) -> NDArray[np.float64]:
    """(models, questions), the questions in one order."""
    rows = [sorted(report[setting]["samples"], key=lambda row: row["id"]) for report in reports]
    return np.array([[row[name] for row in each] for each in rows], float)


def _vas(reports: list[dict[str, Any]], setting: str) -> float:
    return float(np.nanmean(_column(reports, setting, "vas_ratio_of_means_response")))
