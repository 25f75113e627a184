"""Measure what steering attention does to any LightningModule's model, beside a validation or a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from avar_lightning import interventions
from avar_lightning.attention import Intervention, LayerSpec, attention_layers
from avar_lightning.callbacks.answering import AnsweringCallback, query_roles
from avar_lightning.callbacks.foreign import locate_vlm
from avar_lightning.callbacks.measurement import gather
from avar_lightning.callbacks.outputs import log_figures
from avar_lightning.files import write_json
from avar_lightning.interventions import METRICS, UNSTEERED, Setting
from avar_lightning.report import interventions_table, plot_differences
from avar_lightning.rewards import accuracy_reward

Rows = dict[str, list[dict[str, Any]]]


class InterventionCallback(AnsweringCallback):
    """Answer every prompt of `trainer.validate` or `trainer.test` unsteered and steered, and compare.

    The module may be any LightningModule that holds a Hugging Face VLM; its own metrics are untouched. Prompts are
    `batch["prompt"]`, or the batch's sequences up to their last response. Roles come from `role_ids`, or else from
    the chat template of a processor or tokenizer. Answers are greedy, and scored by `reward` against `columns`,
    `answer`, or the batch's own last response.

    Logged for `unsteered` and every setting: `<stage>/<setting>/accuracy`, `vas`, `vas_ratio_of_means`,
    `vas_response`, `vas_ratio_of_means_response`, and for settings the mean paired difference of each over samples,
    `…_difference` with a 95 % bootstrap interval `…_low`, `…_high`. Everything, with all completions, is written to
    `<log_dir>/interventions/<stage>_step_XXXXXXXX.json`, a table is printed, and loggers get a picture.

    Args:
        image: Strength on image tokens; several make a grid.
        system: Strength on system tokens; several make a grid.
        mode: `logit` (the paper's), `mass` or `abs` (PAI's); several make a grid.
        queries: Rows that are steered: `user`, `response` tokens, or `last`; every row when unset.
        layers: Decoder layers: numbers, `"9-14"` or a part of the depth like `"0.3-0.5"`; every layer when unset.
        heads: Query heads by layer, instead of `layers`.
        ablation: `layers` leaves out one layer at a time, `heads` steers one head at a time, `random_heads` compares
            the chosen `heads` with as many of the others drawn at random. Needs a single strength and mode.
        num_random: Draws of `random_heads`.
        seed: Of these draws.
        max_new_tokens: Longest answer.
        max_batches: Measure only this many batches a process; every batch when unset.
        reward: How answers are scored, with TRL's signature; `accuracy_reward` when unset.
        processor: Decodes, and tells roles of batches without them: processor, tokenizer, or name or folder of a
            model; when unset, `processor` or `tokenizer` of the module or its datamodule.
        model: Attribute path of the VLM in the LightningModule, for a module that holds several.

    Raises:
        ValueError: An argument has no meaning; model, roles, prompts or a decoder cannot be found.
    """

    def __init__(
        self,
        *,
        image: float | list[float] = 0.15,
        system: float | list[float] = 0.4,
        mode: Literal["logit", "mass", "abs"] | list[Literal["logit", "mass", "abs"]] = "logit",
        queries: Sequence[Literal["user", "response"]] | Literal["last"] | None = None,
        layers: LayerSpec | None = None,
        heads: dict[int, list[int]] | None = None,
        ablation: Literal["layers", "heads", "random_heads"] | None = None,
        num_random: int = 5,
        seed: int = 0,
        max_new_tokens: int = 256,
        max_batches: int | None = None,
        reward: Callable[..., Sequence[float | None]] | None = None,
        processor: Any = None,
        model: str | None = None,
    ) -> None:
        for name, value in (
            ("max_new_tokens", max_new_tokens),
            ("num_random", num_random),
            ("max_batches", max_batches),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        self.where = {"queries": query_roles(queries), "layers": layers, "heads": heads}
        self.settings = interventions.grid(_listed(image), _listed(system), _listed(mode), **self.where)
        if not self.settings:
            raise ValueError("image and system are 0, which steers nothing; give one of them a strength.")
        if ablation is not None and len(self.settings) > 1:
            raise ValueError(
                f"ablation={ablation!r} came with {len(self.settings)} combinations of image, system and mode, "
                "expected one of each."
            )
        self.ablation, self.num_random, self.seed = ablation, num_random, seed
        self.max_new_tokens, self.max_batches = max_new_tokens, max_batches
        self.reward: interventions.Reward = reward or accuracy_reward
        self.processor, self.model = processor, model
        self.results: dict[str, dict[str, Any]] = {}
        """Of the last run, by setting: means and paired differences, as `interventions.compare` gives them."""
        self._schedule: list[Setting] = []
        self._rows: Rows = {}
        self._batches = 0

    # Running

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = 0
        self._schedule = [UNSTEERED, *self._settings_of(pl_module)] if self._measures(trainer) else []
        self._rows = {setting.name: [] for setting in self._schedule}

    def _settings_of(self, pl_module: LightningModule) -> list[Setting]:
        vlm = locate_vlm(pl_module, self.model)
        only = self.settings[0].intervention or Intervention()
        layers, num_heads = attention_layers(vlm.get_decoder()), vlm.config.get_text_config().num_attention_heads
        if self.ablation == "layers":
            return interventions.leave_one_layer_out(only, layers)
        if self.ablation == "heads":
            return interventions.one_head_each(only, layers, num_heads)
        if self.ablation == "random_heads":
            return interventions.random_heads(only, layers, num_heads, repeats=self.num_random, seed=self.seed)
        return self.settings

    def _answer(self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any]) -> None:
        if not self._schedule or (self.max_batches is not None and self._batches >= self.max_batches):
            return
        self._batches += 1
        asked = self._ask(pl_module, batch)
        columns = interventions.columns_of(batch, asked.role_ids, asked.processor)
        quiet = trainer.progress_bar_callback is None or not trainer.is_global_zero or len(self._schedule) < 3
        for setting in tqdm(self._schedule, desc="settings", leave=False, disable=quiet):
            with trainer.strategy.precision_plugin.val_step_context():
                rows = interventions.answer(
                    asked.vlm,
                    asked.prompt,
                    setting,
                    processor=asked.processor,
                    max_new_tokens=self.max_new_tokens,
                    columns=columns,
                    reward=self.reward,
                )
            # A sample that only fills up another process's batch counts where it belongs.
            self._rows[setting.name] += [row for row, of in zip(rows, columns, strict=True) if not of.get("repeated")]

    # Results

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._schedule:
            return
        rows = _joined(gather(self._rows))
        before = rows[UNSTEERED.name]
        self.results = {name: interventions.compare([before], [after]) for name, after in rows.items()}
        for setting, result in self.results.items():
            for name, value in _scalars(result, differences=setting != UNSTEERED.name).items():
                if value == value:  # an undefined VAS is not logged
                    key = f"{stage}/{setting.replace(' ', '_')}/{name}"
                    # The same number on every process; sync_dist only says so to Lightning.
                    pl_module.log(key, value, batch_size=1, sync_dist=True)
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "interventions"
        if trainer.is_global_zero:
            path = folder / f"{stage}_step_{trainer.global_step:08d}.json"
            write_json(path, self._report(before, rows))
            log_figures(trainer.loggers, self._figures(stage), step=trainer.global_step)
            rank_zero_info(f"\n{interventions_table(self.results)}\n\ninterventions  {path}")
        self._rows = {}

    def _figures(self, stage: str) -> Iterator[tuple[str, Any]]:
        yield f"{stage}/interventions", plot_differences(self.results)  # drawn only where a logger takes it

    def _report(self, before: Sequence[Mapping[str, Any]], rows: Rows) -> dict[str, Any]:
        by_name = {setting.name: setting.intervention for setting in self._schedule}
        return {
            "num_samples": len(before),
            "settings": {
                name: {
                    "intervention": None if by_name[name] is None else dict(vars(by_name[name])),
                    **_scalars(result, differences=True),
                    "samples": rows[name],
                }
                for name, result in self.results.items()
            },
        }


def _scalars(result: Mapping[str, Any], *, differences: bool) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for name in METRICS:
        scalars[name] = result[name]
        if differences:
            difference = dataclasses.asdict(result[f"{name}_difference"])
            scalars[f"{name}_difference"] = difference["mean"]
            scalars |= {f"{name}_{end}": difference[end] for end in ("low", "high")}
    return scalars


def _joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several processes, setting by setting."""
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
