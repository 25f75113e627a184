"""`avar synthesize`: ask, then write. Two passes over the input, with the journal between them.

The first pass has every sample answered, in any order. The second goes through the input again, in its order, and makes
shards, rejected samples and report from the journal alone; so what is written does not depend on when answers came, nor
on how often the run was interrupted, and other filters cost nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from tqdm import tqdm

from avar_lightning.background import wait_for
from avar_lightning.data import Sample, ShardWriter
from avar_lightning.files import json_line, write_json
from avar_lightning.synthesis.asking import Asker, replay
from avar_lightning.synthesis.budget import Budget, cost
from avar_lightning.synthesis.client import Endpoint, connect, connect_inside
from avar_lightning.synthesis.config import DEMO, STAGES, SynthesisConfig
from avar_lightning.synthesis.demo_teacher import DemoTeacher
from avar_lightning.synthesis.filters import normalised
from avar_lightning.synthesis.inputs import Item, count_items, read_items
from avar_lightning.synthesis.journal import Journal, by_stage
from avar_lightning.synthesis.report import SynthesisReport, Tally
from avar_lightning.synthesis.stages import Outcome, Stage, load_stages, prompt_of

JOURNAL, REJECTED, REPORT = "journal.jsonl", "rejected.jsonl", "report.json"


def synthesize(config: SynthesisConfig) -> SynthesisReport:
    """Write visual-anchored reflection data for the questions of `config.input` to `config.output`.

    Written: `journal.jsonl` (every answer, as it comes), and at the end `shard-*.tar` with `manifest.json`,
    `rejected.jsonl` and `report.json`. Called again, also after a kill, it asks only for what has neither answer nor
    refusal yet.

    Returns:
        What was kept, rejected, left and spent.

    Raises:
        ValueError: A setting, a prompt or the journal is no good.
        FileNotFoundError: No such input.
        FileExistsError: The output holds another program's shards.
        RuntimeError: A server refuses or is away, another process is at it, the journal cannot be written, or the
            openai client is missing.
    """
    stages = load_stages(config)
    for stage in stages.values():
        _ = stage.config.api_key  # before anything is asked
    total = count_items(config)
    folder = Path(config.output).expanduser()
    _refuse_foreign_shards(folder, config)
    journal = Journal(
        folder / JOURNAL, _source(config), other_input=config.overwrite, retry_refused=config.retry_refused
    )
    try:
        for path in folder.glob("*.tmp"):  # of a run that was killed while it wrote
            path.unlink()
        report = SynthesisReport(budget=_ask(config, stages, journal, total))
        _write(config, stages, journal, folder, report, total)
        report.spent, report.cost = by_stage(journal.spent, STAGES), cost(journal, stages)
        write_json(folder / REPORT, vars(report))
        return report
    finally:
        journal.close()


def preview(config: SynthesisConfig) -> str:
    """The prompts of the first sample that can be asked, and how many requests all of them take; asks nobody."""
    stages, total = load_stages(config), count_items(config)
    item = next((item for item in read_items(config) if item.problem is None), None)
    if item is None:
        raise ValueError(f"{config.input} has no sample that can be asked, expected question, image and answer.")
    texts = {name: f"[the {name}]" for name in ("description", "chain", "answer")}
    parts = []
    for name, stage in stages.items():
        images = f", {len(item.prints)} image(s)" if stage.sends_image else ""
        parts.append(f"── {name}: {stage.config.model} at {stage.config.base_url}{images}")
        parts.append(prompt_of(stage, item, **texts))
    number = "3 a sample" if total is None else f"at most {3 * total} for {total} samples"
    return "\n".join([*parts, f"── requests: {number}, retries aside"])


def _ask(config: SynthesisConfig, stages: Mapping[str, Stage], journal: Journal, total: int | None) -> str:
    """The first pass; returns the limit that ended it."""
    tally = Tally()

    def told(outcome: Outcome) -> None:
        tally.add(outcome)
        spent, price = journal.total, cost(journal, stages)
        shown = {"requests": spent.requests, "tokens": f"{spent.tokens:,}"}
        shown |= {"kept": tally.kept, "rejected": tally.rejected.total()}
        bar.set_postfix(shown | ({} if price is None else {"cost": f"{price:.2f}"}), refresh=False)
        bar.update()

    def make_endpoints(budget: Budget) -> dict[str, Endpoint]:
        outside, inside = connect(config.concurrency), connect_inside(DemoTeacher(config.demo))
        return {
            name: Endpoint(
                stage,
                budget,
                patience=config.patience,
                max_wait=config.max_wait,
                connections=inside if stage.config.base_url == DEMO else outside,
            )
            for name, stage in stages.items()
        }

    with tqdm(total=total, desc="asking", unit="sample", disable=not config.progress) as bar:
        asker = Asker(config, stages, journal, make_endpoints, told)
        try:
            wait_for(asker.run(item for item, repeated in _once(read_items(config)) if not repeated))
        except KeyboardInterrupt:
            asker.interrupt()
            raise
    return asker.spent


def _write(
    config: SynthesisConfig,
    stages: Mapping[str, Stage],
    journal: Journal,
    folder: Path,
    report: SynthesisReport,
    total: int | None,
) -> None:
    """The second pass."""
    responses: set[bytes] = set()
    unfinished = folder / f"{REJECTED}.tmp"
    with (
        ShardWriter(
            folder, samples_per_shard=config.samples_per_shard, image_format=config.image_format, overwrite=True
        ) as writer,
        unfinished.open("w", encoding="utf-8", errors="backslashreplace") as rejected,
    ):
        items = tqdm(_once(read_items(config)), total=total, desc="writing", unit="sample", disable=not config.progress)
        for item, repeated in items:
            report.read += 1
            outcome = Outcome("repeated", "the image and question of an earlier sample") if repeated else None
            outcome = outcome or replay(item, stages, config, journal)
            if outcome is None:
                report.left += 1
                continue
            if not outcome.reason and config.filters.duplicate_responses:
                outcome = _unless_seen(outcome, responses)
            if outcome.reason:
                report.rejected[outcome.reason] += 1
                _reject(rejected, item, outcome)
            else:
                report.kept += 1
                writer.write(_finished(item, outcome, stages))
    os.replace(unfinished, folder / REJECTED)
    report.shards = [path.name for path in writer.paths]


def _once(items: Iterator[Item]) -> Iterator[tuple[Item, bool]]:
    """Each with whether its images and question came before."""
    seen: set[bytes] = set()
    for item in items:
        repeated = item.problem is None and item.asked in seen
        if item.problem is None:
            seen.add(item.asked)
        yield item, repeated


def _unless_seen(outcome: Outcome, responses: set[bytes]) -> Outcome:
    words = hashlib.sha256(normalised(outcome.response).encode("utf-8", "replace")).digest()[:16]
    if words in responses:
        return replace(outcome, reason="duplicate", detail="the response of an earlier sample")
    responses.add(words)
    return outcome


def _reject(file: IO[str], item: Item, outcome: Outcome) -> None:
    reason = f"{outcome.reason}: {outcome.detail}"
    file.write(json_line({"id": item.id, "where": item.where, "reason": reason, "response": outcome.response}))


def _finished(item: Item, outcome: Outcome, stages: Mapping[str, Stage]) -> Sample:
    """The sample with its response, and where it comes from."""
    assert item.sample is not None
    provenance = {
        "models": {name: stage.config.model for name, stage in stages.items()},
        "prompts": {name: stage.prompt_hash for name, stage in stages.items()},
        "scores": outcome.scores,
        "tokens": outcome.tokens,
    }
    messages = [*item.sample.messages, {"role": "assistant", "content": outcome.response}]
    return replace(item.sample, messages=messages, columns=item.sample.columns | {"synthesis": provenance})


def _source(config: SynthesisConfig) -> str:
    return DEMO if config.input == DEMO else str(config.input)


def _refuse_foreign_shards(folder: Path, config: SynthesisConfig) -> None:
    held = []
    with suppress(OSError):
        held = sorted(folder.glob("*.tar"))
    if held and not (folder / JOURNAL).is_file() and not config.overwrite:
        raise FileExistsError(
            f"{folder} already holds {len(held)} shard(s) and no {JOURNAL}; give another output, or --overwrite=true."
        )
