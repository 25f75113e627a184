"""Evaluate any LightningModule's model on benchmarks: answers, verdicts, accuracy and VAS with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from avar_lightning import interventions
from avar_lightning.attention import LayerSpec
from avar_lightning.benchmarks import benchmark_of
from avar_lightning.callbacks.foreign import find_processor, find_role_ids, locate_vlm
from avar_lightning.callbacks.measurement import QUERIES, gather
from avar_lightning.evaluation import (
    AnswerFile,
    Judge,
    JudgeConfig,
    about_model,
    ask_judge,
    by_rules,
    evaluate,
    judge_again,
    open_folder,
    read_answers,
    write_results,
)
from avar_lightning.evaluation.answers import SCORES, Key, in_order, key_of, twice
from avar_lightning.evaluation.prompts import fingerprint, text_of
from avar_lightning.interventions import UNSTEERED
from avar_lightning.processing import padding_id

Row = dict[str, Any]


class BenchmarkCallback(Callback):
    """Answer the prompts of `trainer.test` or `trainer.validate`, and judge them as their benchmarks do.

    The module may be any LightningModule that holds a Hugging Face VLM; its own metrics are untouched. Samples come
    from `avar convert --benchmark`: their columns `benchmark` and `id` say what they are, and the benchmark's rules
    judge. Answers are greedy, and on disk as soon as a batch is answered: a run that was stopped goes on where it was,
    and benchmarks may come into one folder one after the other. Results are of all answers in the folder.

    Written to `output`: `answers_<process>.jsonl` as they come; at the end `samples.jsonl` (every answer with its last
    verdict), `results.json`, `results.csv`, `results.md` and `results.png`. Logged: `<stage>/<benchmark>/<figure>`,
    `vas` and `vas_ratio_of_means` (of user tokens; with the suffix `_response`, of answers).

    Args:
        output: Folder of answers and results; `<log_dir>/benchmarks` when unset, which a later run does not find again.
        max_new_tokens: Longest answer, reasoning included.
        image: Strength of steering on image tokens; 0 steers nothing.
        system: Strength of steering on system tokens, which it lowers; 0 steers nothing.
        mode: `logit` (the paper's), `mass` or `abs` (PAI's).
        queries: Rows that are steered: `user`, `response` tokens, or `last`; every row when unset.
        layers: Decoder layers that are steered: numbers, `"9-14"` or a part of the depth like `"0.3-0.5"`.
        judge: Who reads responses in which the rules find no answer; nobody when unset.
        overwrite: Delete the answers that are in `output`, of whichever model.
        processor: Decodes, and tells roles of batches without them: processor, tokenizer, or name or folder of a
            model; when unset, `processor` or `tokenizer` of the module or its datamodule.
        model: Attribute path of the VLM in the LightningModule, for a module that holds several.

    Raises:
        ValueError: An argument has no meaning; `output` holds answers of another model, or of other prompts; samples
            name no benchmark; model, roles, prompts or a decoder cannot be found.
    """

    def __init__(
        self,
        *,
        output: str | None = None,
        max_new_tokens: int = 4096,
        image: float = 0.0,
        system: float = 0.0,
        mode: Literal["logit", "mass", "abs"] = "logit",
        queries: Sequence[Literal["user", "response"]] | Literal["last"] | None = None,
        layers: LayerSpec | None = None,
        judge: JudgeConfig | None = None,
        overwrite: bool = False,
        processor: Any = None,
        model: str | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}, expected at least 1.")
        roles: Any = queries
        if queries is not None and not isinstance(queries, str):
            if not queries or set(queries) - set(QUERIES):
                raise ValueError(f"queries={list(queries)!r}, expected one or both of {list(QUERIES)}, or last.")
            roles = tuple(QUERIES[name] for name in queries)
        steered = interventions.grid([image], [system], [mode], queries=roles, layers=layers)
        self.setting = steered[0] if steered else UNSTEERED
        self.output, self.max_new_tokens, self.overwrite = output, max_new_tokens, overwrite
        self.judge, self.processor, self.model = judge, processor, model
        self.results: dict[str, dict[str, Any]] = {}
        """Of the last run, by benchmark, in the first process: as `evaluation.evaluate` gives them."""
        self._folder = Path()
        self._file: AnswerFile | None = None
        self._about: dict[str, Any] = {}
        self._answers: dict[Key, Row] = {}
        self._old: set[Key] = set()
        self._own: dict[Key, None] = {}

    # Running

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the answers that are there."""
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the answers that are there."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Answer what is missing."""
        self._answer(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Answer what is missing."""
        self._answer(trainer, pl_module, batch)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn not in ("validate", "test"):
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "strategy fsdp keeps weights sharded outside of the module's forward, where BenchmarkCallback "
                "generates; use fsdp2 (ModelParallelStrategy), DDP or one device."
            )
        if self.judge is not None:
            _ = self.judge.api_key  # said now if it is not there, and not after hours of answers
        # A collective call under DDP, as every process must ask the logger.
        self._folder = Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "benchmarks")
        self._about = about_model(
            locate_vlm(pl_module, self.model),
            precision=str(trainer.precision),
            max_new_tokens=self.max_new_tokens,
            intervention=self.setting.intervention,
        )
        problem = self._open() if trainer.is_global_zero else None
        if problem := gather(problem)[0]:
            raise ValueError(problem)
        self._answers = read_answers(self._folder)
        self._old, self._own, self.results = set(self._answers), {}, {}
        trainer.strategy.barrier("answers were read")  # before any process adds to them
        self._file = AnswerFile(self._folder, trainer.global_rank)
        if self._old:
            rank_zero_info(f"{len(self._old)} answers are in {self._folder}; what is missing is answered.")

    def _open(self) -> str | None:
        """What is wrong with the folder, which every process must hear of."""
        how = "set overwrite: true (--trainer.callbacks.init_args.overwrite true)"
        try:
            open_folder(self._folder, self._about, overwrite=self.overwrite, how=how)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _answer(self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        processor = find_processor(pl_module, self.processor)
        if processor is None:
            raise ValueError(
                f"neither {type(pl_module).__name__} nor its datamodule has a `processor` or `tokenizer` to decode "
                "answers with; set one, or give BenchmarkCallback a `processor`."
            )
        vlm = locate_vlm(pl_module, self.model)
        role_ids = find_role_ids(batch, pl_module, processor)
        columns = _columns_of(batch, len(role_ids))
        prompt = interventions.prompt_of(batch, role_ids, vlm, padding_id(processor))
        asked = [ids[kept] for ids, kept in zip(prompt["input_ids"], prompt["attention_mask"].bool(), strict=True)]
        missing = self._missing(columns, [fingerprint(ids) for ids in asked])
        if not _anywhere(trainer, bool(missing)):
            return
        with trainer.strategy.precision_plugin.val_step_context():
            made = interventions.answer(
                vlm,
                prompt,
                self.setting,
                processor=processor,
                max_new_tokens=self.max_new_tokens,
                columns=columns,
                reward=_unscored,
            )
        rows = []
        for index, prompt_id in missing.items():
            own, response = columns[index], made[index]["completion"]
            row = {"benchmark": own["benchmark"], "id": str(own["id"])}
            row |= {"prompt": text_of(asked[index], processor, vlm.config), "response": response}
            row |= by_rules(response, own) | {name: made[index][name] for name in SCORES}
            rows.append(row | {"prompt_id": prompt_id, "columns": own})
        self._file.append(rows)
        self._answers |= {key_of(row): row for row in rows}

    def _missing(self, columns: Sequence[Mapping[str, Any]], prompt_ids: Sequence[str]) -> dict[int, str]:
        """Samples of a batch without an answer, with their prompts' ids; those that fill it up are of another batch."""
        missing = {}
        for index, (own, prompt_id) in enumerate(zip(columns, prompt_ids, strict=True)):
            if own.get("repeated"):
                continue
            key = benchmark_of(own.get("benchmark")).name, str(own["id"])
            if key in self._own:
                raise ValueError(twice(key))
            self._own[key] = None
            before = self._answers.get(key)
            if before is None:
                missing[index] = prompt_id
            elif before["prompt_id"] != prompt_id:
                raise ValueError(
                    f"{self._folder} holds an answer to another prompt for sample {key[1]!r} of {key[0]}, expected the "
                    "same text and number of image tokens; give another output, or set overwrite: true."
                )
        return missing

    # Results

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the processes, judge, sum up and write."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the processes, judge, sum up and write."""
        self._finish(trainer, pl_module, "test")

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._file is None:
            return
        self._close()
        rows = self._joined()
        scalars = (
            self._sum_up(rows, progress=trainer.progress_bar_callback is not None) if trainer.is_global_zero else {}
        )
        for name, value in gather(scalars)[0].items():
            # The same number on every process; sync_dist only says so to Lightning.
            pl_module.log(f"{stage}/{name}", value, batch_size=1, sync_dist=True)
        self._answers, self._own = {}, {}

    def _joined(self) -> list[Row]:
        """Every answer in the folder, in an order that does not depend on who made it."""
        answers = {key: self._answers[key] for key in self._old}
        seen: set[Key] = set()
        for part in gather({key: self._answers[key] for key in self._own}):
            if both := seen & part.keys():
                raise ValueError(twice(min(both)))
            seen |= part.keys()
            answers |= part
        return in_order(answers)

    def _sum_up(self, rows: list[Row], *, progress: bool) -> dict[str, float]:
        if not rows:
            rank_zero_warn("BenchmarkCallback saw no sample, expected batches with columns; nothing is written.")
            return {}
        judge = None if self.judge is None else Judge(self.judge, self._folder, progress=progress)
        judge_again([row for row in rows if key_of(row) in self._old])
        if judge is not None:
            ask_judge(judge, rows)
            if judge.trouble:
                rank_zero_warn(f"{judge.num_open} answers stay unjudged: {judge.trouble}")
        self.results = evaluate(rows)
        report = None if judge is None else judge.report
        tables = write_results(self._folder, self.results, rows, about=self._about, judge=report)
        rank_zero_info(f"\n{tables}\n\nresults  {self._folder / 'results.md'}")
        figures = {
            f"{name}/{figure}": interval.value
            for name, result in self.results.items()
            for figure, interval in (result["metrics"] | result["vas"]).items()
        }
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the file."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the file."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _columns_of(batch: Mapping[str, Any], size: int) -> list[Row]:
    columns = batch.get("columns")
    if not isinstance(columns, list) or len(columns) != size or any(column.get("id") is None for column in columns):
        raise ValueError(
            "a batch has no 'columns' with the id of each sample, expected those of avar convert --benchmark; read its "
            "shards with ShardDataModule, or carry a list of mappings in batch['columns']."
        )
    return [dict(column) for column in columns]


def _anywhere(trainer: Trainer, here: bool) -> bool:
    """Whether any process has something to answer, where all must answer together to have whole weights."""
    return any(gather(here)) if isinstance(trainer.strategy, ModelParallelStrategy) else here


def _unscored(completions: Sequence[str], **_: Any) -> list[None]:
    """No reward: verdicts need the benchmark's rules."""
    return [None] * len(completions)
