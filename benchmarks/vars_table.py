"""Measure what visual rewards do on the demo: cold start, GRPO without them, and with each transform; several seeds.

Each seed has its own cold start (`configs/avar_sft.yaml` on responses of mixed style), from which every arm of GRPO
(`configs/avar_grpo.yaml`) goes on. Finished runs are kept, so an interrupted table continues where it stopped.

    python benchmarks/vars_table.py --seeds 0 1 2 --jobs 2
"""

from __future__ import annotations

import json
import platform
import statistics
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path

from tqdm import tqdm
from trainings import SFT_SOURCES, run_folder, table_options, threads_of, train

from avar_lightning.data import DemoDataModule
from avar_lightning.report import REWARD_COLUMNS, plot_results, results_table
from avar_lightning.rewards import TRANSFORMS

ARMS = {"GRPO": ["--model.init_args.visual=null"]} | {
    f"GRPO + VARS, {transform}": [f"--model.init_args.visual.transform={transform}"] for transform in TRANSFORMS
}
START_OPTIONS = ["--data.init_args.style=mixed", "--trainer.val_check_interval=300"]
METRICS = {
    "accuracy": "val/accuracy",
    "rollouts": "reward/accuracy",
    "vas": "rollout/vas",
    "format": "reward/format",
    "length": "rollout/length",
    "vas_reference": "val/vas_ratio_of_means_response",
}


def start_folder(folder: Path, seed: int) -> Path:
    """Where the cold start of a seed lies."""
    return run_folder(folder, "start", seed, SFT_SOURCES, START_OPTIONS)


def arm_options(start: Path, arm: str, steps: int, extra: list[str]) -> list[str]:
    """Overrides of one arm."""
    return [
        f"--model.init_args.vlm.pretrained={start / 'hf'}",
        f"--model.init_args.sampling.seed={start.name.split('_')[1]}",
        "--model.init_args.grpo.vas_every=1",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        *ARMS[arm],
        *extra,
    ]


def arm_folder(folder: Path, arm: str, seed: int, steps: int, extra: list[str]) -> Path:
    """Where the run of one arm with one seed lies."""
    name = arm.replace(" + ", "_").replace(", ", "_")
    options = arm_options(start_folder(folder, seed), arm, steps, extra)
    return run_folder(folder, name, seed, ["configs/avar_grpo.yaml", *SFT_SOURCES], options)


def completions(place: Path, tables: slice) -> list[dict]:
    """Rows of some of CompletionsCallback's tables."""
    files = sorted((place / "completions").glob("*.jsonl"))[tables]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def style_of(row: dict) -> str:
    """How a completion answers."""
    text = row["completion"]
    if "I look at the picture" in text:
        return "describes the picture"
    return "reasons without looking" if "<think>" in text else "answers at once"


def describing(place: Path, tables: slice) -> float:
    """Share of completions that describe the picture before they answer."""
    return statistics.mean(style_of(row) == "describes the picture" for row in completions(place, tables))


def vas_by_style(places: list[Path]) -> str:
    """Mean VAS of the first completions of each style."""
    found: dict[str, list[float]] = {}
    for row in (row for place in places for row in completions(place, slice(0, 1))):
        if row["vas"] is not None:
            found.setdefault(style_of(row), []).append(row["vas"])
    means = (f"{style} {statistics.mean(values):.1f} ({len(values)})" for style, values in sorted(found.items()))
    return f"VAS of the cold start's completions by style (number of them): {', '.join(means)}."


def main() -> None:
    options = table_options(__doc__.splitlines()[0], name="vars_table", arms=ARMS, steps=50)
    folder = options.folder.resolve()

    if not options.collect:
        # Once, before the runs would race for them.
        DemoDataModule(style="mixed").prepare_data()
        DemoDataModule(train_hint_rate=0.25).prepare_data()
        threads = threads_of(options.jobs)
        jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
        with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(options.seeds) + len(jobs), desc="runs") as bar:

            def begin(seed: int) -> None:
                train(start_folder(folder, seed), "configs/avar_sft.yaml", seed, START_OPTIONS, threads=threads)
                bar.update()

            def go_on(job: tuple[str, int]) -> None:
                arm, seed = job
                overrides = arm_options(start_folder(folder, seed), arm, options.steps, options.extra)
                place = arm_folder(folder, arm, seed, options.steps, options.extra)
                train(place, "configs/avar_grpo.yaml", seed, overrides, threads=threads)
                bar.update()

            list(pool.map(begin, options.seeds))
            list(pool.map(go_on, jobs))

    rows: list[dict] = []
    finished: list[Path] = []
    for arm in options.arms:
        places = [arm_folder(folder, arm, seed, options.steps, options.extra) for seed in options.seeds]
        places = [place for place in places if (place / "summary.json").is_file()]
        finished = finished or places  # every arm of a seed begins with the same completions
        runs = [json.loads((place / "summary.json").read_text()) for place in places]
        if runs and not rows:
            before = {key: [run["before"][name] for run in runs] for key, name in METRICS.items()}
            before["describes"] = [describing(place, slice(0, 1)) for place in places]
            rows.append({"name": "cold start", "reference": True} | before)
        if runs:
            after = {key: [run["after"][name] for run in runs] for key, name in METRICS.items()}
            rows.append({"name": arm, "describes": [describing(place, slice(-2, None)) for place in places]} | after)
    if not rows:
        raise SystemExit(f"error: no finished run of this recipe in {folder}; call without --collect.")
    seeds = ", ".join(map(str, options.seeds))
    about = (
        "Accuracy of greedy answers to 200 validation questions; rollouts are sampled completions of training "
        "prompts, means over the last 5 batches (the first 5 of the first arm for the cold start); those that describe "
        "the picture are counted in 32 completions a run (16 for the cold start); references are the validation set's "
        "own responses; VAS is the ratio of mean masses; "
        f"{options.steps} updates; mean ± sd over the first of seeds {seeds}; {platform.machine()} CPU, torch "
        f"{metadata.version('torch')}, transformers {metadata.version('transformers')}; {date.today()}; `make vars`."
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "vars.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    styles = vas_by_style(finished)
    (options.output / "vars.md").write_text(f"{results_table(rows, columns=REWARD_COLUMNS)}\n\n{about}\n\n{styles}\n")
    plot_results(rows, columns=REWARD_COLUMNS).savefig(options.output / "vars.png", dpi=150)
    print((options.output / "vars.md").read_text())


if __name__ == "__main__":
    main()
