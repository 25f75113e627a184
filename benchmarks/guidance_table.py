"""Measure what guidance does on the demo: every form and query set, several seeds, into the README's table and picture.

Each run is `train.py fit --config configs/avar_sft.yaml` with its overrides in a process of its own. Finished runs are
kept, so an interrupted table continues where it stopped.

    python benchmarks/guidance_table.py --seeds 0 1 2 --jobs 2
"""

from __future__ import annotations

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path

from tqdm import tqdm
from trainings import SFT_SOURCES, run_folder, table_options, threads_of, train

from avar_lightning.data import DemoDataModule
from avar_lightning.report import plot_results, results_table

QUERY_SETS = {"U": ["user"], "T": ["response"], "U∪T": ["user", "response"]}
ARMS = {"plain": ("none", "T")} | {
    f"{form}, Q = {name}": (form, name) for form in ("published", "share", "hinge") for name in QUERY_SETS
}
METRICS = {
    "accuracy": "val/accuracy",
    "vas": "val/vas_ratio_of_means_response",
    "share": "val/image_share_response",
    "vas_published": "val/vas",
    "loss": "val/loss",
}


def options_of(arm: str, steps: int, extra: list[str]) -> list[str]:
    """Overrides of one arm."""
    form, queries = ARMS[arm]
    return [
        f"--model.init_args.guidance.form={form}",
        f"--model.init_args.guidance.queries=[{','.join(QUERY_SETS[queries])}]",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        *extra,
    ]


def main() -> None:
    options = table_options(__doc__.splitlines()[0], name="guidance_table", arms=ARMS, steps=300)

    def place_of(arm: str, seed: int) -> Path:
        name = arm.replace(", Q = ", "_").replace("∪", "")
        overrides = options_of(arm, options.steps, options.extra)
        return run_folder(options.folder.resolve(), name, seed, SFT_SOURCES, overrides)

    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    if not options.collect:
        DemoDataModule().prepare_data()  # once, before the runs would race for it
        threads = threads_of(options.jobs)
        with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), desc="runs") as bar:

            def one(job: tuple[str, int]) -> None:
                arm, seed = job
                overrides = options_of(arm, options.steps, options.extra)
                train(place_of(*job), "configs/avar_sft.yaml", seed, overrides, threads=threads)
                bar.update()

            list(pool.map(one, jobs))

    paths = {job: place_of(*job) / "summary.json" for job in jobs}
    done = {job: json.loads(path.read_text()) for job, path in paths.items() if path.is_file()}
    if not done:
        raise SystemExit(f"error: no finished run of this recipe in {options.folder}; call without --collect.")
    before = next(iter(done.values()))["before"]
    rows: list[dict] = [{"name": "base, before training", "reference": True}]
    rows[0] |= {key: [before[metric]] for key, metric in METRICS.items()}
    for arm in options.arms:
        after = [done[arm, seed]["after"] for seed in options.seeds if (arm, seed) in done]
        if after:
            rows.append({"name": arm} | {key: [run[metric] for run in after] for key, metric in METRICS.items()})
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "guidance.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    seeds = ", ".join(map(str, options.seeds))
    environment = (
        f"{platform.machine()} CPU, torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
    )
    heading = (
        "Accuracy of generated answers; VAS (ratio of mean masses) and image share of tokens of reference responses; "
        f"{options.steps} steps; mean ± sd over the first of seeds {seeds}; {environment}; {date.today()}; "
        "`make table`."
    )
    (options.output / "guidance.md").write_text(f"{results_table(rows)}\n\n{heading}\n")
    plot_results(rows).savefig(options.output / "guidance.png", dpi=150)
    print((options.output / "guidance.md").read_text())


if __name__ == "__main__":
    main()
