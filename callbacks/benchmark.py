"""Evaluate any LightningModule's model on benchmarks: answers, verdicts, accuracy and VAS with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from avar_lightning import interventions
from avar_lightning.attention import LayerSpec
from avar_lightning.callbacks.answering import AnsweringCallback, query_roles
from avar_lightning.callbacks.foreign import locate_vlm
from avar_lightning.callbacks.measurement import gather
from avar_lightning.data import ShardDataModule
from avar_lightning.evaluation import (
    AnswerBook,
    Judge,
    JudgeConfig,
    about_model,
    about_shards,
    ask_judge,
    by_rules,
    evaluate,
    judge_again,
    open_folder,
    read_about,
    renew_columns,
    scalars,
    write_results,
)
from avar_lightning.evaluation.answers import SCORES
from avar_lightning.evaluation.prompts import fingerprint, opens_thinking, pictures_of, samples_of, text_of
from avar_lightning.interventions import UNSTEERED

Row = dict[str, Any]


class BenchmarkCallback(AnsweringCallback):
    """Answer the prompts of `trainer.test` or `trainer.validate`, and judge them as their benchmarks do.

    The module may be any LightningModule that holds a Hugging Face VLM; its own metrics are untouched. Samples come
    from `avar convert --benchmark`: their columns `benchmark` and `id` say what they are, and the benchmark's rules
    judge. Answers are greedy, and on disk as soon as a batch is answered: a run that was stopped goes on where it was,
    and benchmarks may come into one folder one after the other. Results are of all answers in the folder. Of a
    `ShardDataModule` the pictures are kept in batches, so that answers to other pictures are known as such.

    Written to `output`: `answers_<process>.jsonl` as they come; at the end `samples.jsonl` (every answer with its last
    verdict), `results.json`, `results.csv`, `results.md` and `results.png`. Logged: `<stage>/<benchmark>/<figure>`,
    `vas` and `vas_ratio_of_means` (of user tokens; with the suffix `_response`, of answers).

    Args:
        output: Folder of answers and results; `<log_dir>/benchmarks` when unset, which a later run does not find again.
        max_new_tokens: Longest answer, reasoning included.
        repetition_penalty: Of the greedy decoding; 1 is none. A checkpoint's own generation settings do not count.
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
        ValueError: An argument has no meaning; `output` holds answers of another model, or of other prompts, or another
            run is at work there; samples name no benchmark; model, roles, prompts or a decoder cannot be found.
    """

    def __init__(
        self,
        *,
        output: str | None = None,
        max_new_tokens: int = 4096,
        repetition_penalty: float = 1.0,
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
        if not 0 < repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={repetition_penalty}, expected more than 0, and 1 for none.")
        steered = interventions.grid([image], [system], [mode], queries=query_roles(queries), layers=layers)
        self.setting = steered[0] if steered else UNSTEERED
        self.output, self.overwrite = output, overwrite
        self.max_new_tokens, self.repetition_penalty = max_new_tokens, repetition_penalty
        self.judge, self.processor, self.model = judge, processor, model
        self.results: dict[str, dict[str, Any]] = {}
        """Of the last run, by benchmark, in the first process: as `evaluation.evaluate` gives them."""
        self._book: AnswerBook | None = None
        self._held = ExitStack()

    # Running

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have pictures kept."""
        data = getattr(trainer, "datamodule", None)
        if stage in ("validate", "test") and isinstance(data, ShardDataModule):
            data.keep_images = True

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._measures(trainer):
            return
        if self.judge is not None:
            _ = self.judge.api_key  # said now if it is not there, and not after hours of answers
        # A collective call under DDP, as every process must ask the logger.
        folder = Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "benchmarks")
        about = about_model(
            locate_vlm(pl_module, self.model),
            precision=str(trainer.precision),
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            intervention=self.setting.intervention,
        )
        problem = self._open(folder, about | {"data": _data_of(trainer)}) if trainer.is_global_zero else None
        if problem := gather(problem)[0]:
            raise ValueError(problem)
        self._book, self.results = AnswerBook(folder, trainer.global_rank), {}
        trainer.strategy.barrier("answers were read")  # before any process adds to them
        if self._book.num_old:
            rank_zero_info(f"{self._book.num_old} answers are in {folder}; what is missing is answered.")

    def _open(self, folder: Path, about: Mapping[str, Any]) -> str | None:
        """What is wrong with the folder, which every process must hear of."""
        how = "set overwrite: true (--trainer.callbacks.init_args.overwrite true)"
        try:
            self._held.enter_context(open_folder(folder, about, overwrite=self.overwrite, how=how))
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _answer(self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any]) -> None:
        if self._book is None:
            return
        asked = self._ask(pl_module, batch)
        vlm, processor, prompt = asked.vlm, asked.processor, asked.prompt
        columns = samples_of(batch, len(asked.role_ids))
        kept = prompt["attention_mask"].bool()
        prompts = [ids[real] for ids, real in zip(prompt["input_ids"], kept, strict=True)]
        prompt_ids = [fingerprint(*each) for each in zip(prompts, pictures_of(batch, len(prompts)), strict=True)]
        missing = self._book.missing(columns, prompt_ids)
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
                repetition_penalty=self.repetition_penalty,
            )
        rows = []
        for index, prompt_id in missing.items():
            own, ids, new = columns[index], prompts[index], made[index]
            row = {"benchmark": own["benchmark"], "id": str(own["id"]), "prompt": text_of(ids, processor, vlm.config)}
            row |= {"thinking": opens_thinking(ids, processor), "response": new["completion"], "columns": own}
            row |= {name: new[name] for name in ("finished", "num_tokens", *SCORES)}
            rows.append(row | by_rules(row) | {"prompt_id": prompt_id})
        self._book.append(rows)

    # Results

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._book is None:
            return
        self._book.close()
        rows = self._book.joined(gather(self._book.seen))
        figures = self._sum_up(trainer, self._book, rows) if trainer.is_global_zero else {}
        for name, value in gather(figures)[0].items():
            # The same number on every process; sync_dist only says so to Lightning.
            pl_module.log(f"{stage}/{name}", value, batch_size=1, sync_dist=True)
        self._close()

    def _sum_up(self, trainer: Trainer, book: AnswerBook, rows: list[Row]) -> dict[str, float]:
        if not rows:
            rank_zero_warn("BenchmarkCallback saw no sample, expected batches with columns; nothing is written.")
            return {}
        progress = trainer.progress_bar_callback is not None
        judge = None if self.judge is None else Judge(self.judge, book.folder, progress=progress)
        renew_columns(book.folder, rows)
        judge_again(filter(book.is_old, rows))
        if judge is not None:
            ask_judge(judge, rows)
            if judge.trouble:
                rank_zero_warn(f"{judge.num_open} answers stay unjudged: {judge.trouble}")
        self.results = evaluate(rows)
        about, report = read_about(book.folder), None if judge is None else judge.report
        tables = write_results(book.folder, self.results, rows, about=about, judge=report)
        rank_zero_info(f"\n{tables}\n\nresults  {book.folder / 'results.md'}")
        return scalars(self.results)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the folder."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._close()

    def _close(self) -> None:
        if self._book is not None:
            self._book.close()
        self._book = None
        self._held.close()


def _data_of(trainer: Trainer) -> dict[str, Any]:
    """What is known of the shards beside their samples."""
    data, name = getattr(trainer, "datamodule", None), "test" if trainer.testing else "val"
    spec = data.specs[name] if isinstance(data, ShardDataModule) else None
    return {} if spec is None else about_shards(spec)


def _anywhere(trainer: Trainer, here: bool) -> bool:
    """Whether any process has something to answer, where all must answer together to have whole weights."""
    return any(gather(here)) if isinstance(trainer.strategy, ModelParallelStrategy) else here


def _unscored(completions: Sequence[str], **_: Any) -> list[None]:
    """No reward: verdicts need the benchmark's rules."""
    return [None] * len(completions)
