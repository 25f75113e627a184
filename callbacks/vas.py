"""Measure visual attention while any LightningModule validates."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image

from avar_lightning.attention import AttentionRecord, observe_attention
from avar_lightning.callbacks.foreign import find_processor, find_role_ids, locate_vlm, sample_ids
from avar_lightning.callbacks.measurement import KEYS, QUERIES, Measurement, gather, merge
from avar_lightning.callbacks.outputs import log_figures, vas_figures
from avar_lightning.callbacks.overlay import Overlay, OverlayError, lay_on_image
from avar_lightning.families import has_square_images
from avar_lightning.files import write_json
from avar_lightning.roles import Role
from avar_lightning.vas import REDUCTIONS


class VASCallback(Callback):
    """Log the Visual Attention Score of a vision-language model at every validation.

    It watches the forward that `validation_step` makes on `batch["input_ids"]` anyway: no second forward, no
    gradient, no change to the model. The module may be any LightningModule that holds a Hugging Face VLM;
    roles come from `batch["role_ids"]`, or else from the chat template of a processor or tokenizer.

    Logged, for user tokens (the paper's queries) and with the suffix `_response` for response tokens, means
    over samples: `val/vas`, `val/vas_ratio_of_means` and `val/image_share` (image / (image + system)).
    Pictures go to TensorBoard and to loggers that have `log_image`. Everything, also per sample, is written
    to `<log_dir>/vas/step_XXXXXXXX.json`, and the images that overlays lie on to `overlay_<n>.png` beside it.
    A sample without image, system tokens or queries counts nowhere.
    Several validation dataloaders count as one.

    Args:
        baseline: extend the sanity check to the whole validation set, and keep its result as the baseline.
        reduction: how `val/vas` weighs layers, heads and tokens; `mean_of_ratios` is the paper's.
        queries: query sets to measure.
        layers: decoder layers to measure; every layer when unset.
        max_batches: measure only this many batches a validation and process; every batch when unset.
        num_overlays: pictures of the attention from responses to the image, of the first samples of rank 0.
        processor: for batches without roles: name or folder of a model with the chat template, or the
            processor or tokenizer; when unset, `processor` or `tokenizer` of the module or its datamodule.
        model: attribute path of the VLM in the LightningModule, for a module that holds several.

    Raises:
        ValueError: an argument has no meaning; no forward over the batch's tokens was seen in a whole
            validation; model, roles or `input_ids` cannot be found.
    """

    def __init__(
        self,
        *,
        baseline: bool = True,
        reduction: Literal["mean_of_ratios", "ratio_of_means", "share", "median"] = "mean_of_ratios",
        queries: Sequence[Literal["user", "response"]] = ("user", "response"),
        layers: list[int] | None = None,
        max_batches: int | None = None,
        num_overlays: int = 4,
        processor: Any = None,
        model: str | None = None,
    ) -> None:
        if not queries or set(queries) - set(QUERIES):
            raise ValueError(f"queries={list(queries)!r}, expected one or both of {list(QUERIES)}.")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}, expected one of {list(REDUCTIONS)}.")
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches={max_batches}, expected at least 1, or None for every batch.")
        if num_overlays < 0:
            raise ValueError(f"num_overlays={num_overlays}, expected 0 (no pictures) or more.")
        self.take_baseline = baseline
        self.reduction = reduction
        self.queries = tuple(queries)
        self.layers = layers
        self.max_batches = max_batches
        self.num_overlays = num_overlays
        self.processor = processor
        self.model = model
        self.baseline: dict[str, float] = {}
        """Every `val/*` metric before training; empty until it was measured."""
        self.latest: dict[str, float] = {}
        """Every `val/*` metric of the last validation."""
        self._folder = Path()
        self._watching = ExitStack()
        self._record: AttentionRecord | None = None
        self._received: AttentionRecord | None = None
        self._measurement = Measurement(self.queries)
        self._overlays: list[Overlay] = []
        self._explained = False

    # Baseline

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder of the JSON files, and let the sanity check see the whole validation set."""
        # A collective call under DDP, so it cannot wait until rank 0 writes.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "vas"
        starts = stage == "fit" and trainer.global_step == 0 and trainer.ckpt_path is None
        if starts and self.take_baseline and not _rehearses(trainer):
            trainer.num_sanity_val_steps = float("inf")

    def state_dict(self) -> dict[str, Any]:
        """Keep the baseline in checkpoints."""
        return {"baseline": self.baseline, "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the baseline of the run that is resumed."""
        self.baseline, self.latest = state_dict["baseline"], state_dict["latest"]

    # Watching

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new measurement."""
        self._measurement = Measurement(self.queries)
        self._overlays = []

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Watch the forwards of this batch."""
        self._stop_watching()
        if self.max_batches is not None and self._measurement.batches >= self.max_batches:
            return
        role_ids = find_role_ids(batch, pl_module, self.processor)
        vlm = locate_vlm(pl_module, self.model)
        watching = self._watching
        self._record = watching.enter_context(
            observe_attention(
                vlm,
                role_ids,
                queries=[QUERIES[name] for name in self.queries],
                keys=KEYS,
                layers=self.layers,
                only_matching=True,
            )
        )
        if trainer.is_global_zero and len(self._overlays) < self.num_overlays:
            self._received = watching.enter_context(
                observe_attention(
                    vlm,
                    role_ids,
                    queries=[Role.RESPONSE],
                    layers=self.layers,
                    received=True,
                    only_matching=True,
                )
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the model as it was and keep what was seen."""
        record, received = self._record, self._received
        self._stop_watching()
        if record is None:
            return
        if not record.layers:
            self._measurement.unmatched += 1
            return
        ids = sample_ids(batch, len(record.role_ids))
        self._measurement.update(record.stacked(), record.role_ids, ids, layers=record.layers)
        if received is not None:
            self._keep_overlays(pl_module, batch, received, ids)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._stop_watching()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._record = self._received = None
        self._watching.close()

    # Results

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the processes and log means over samples."""
        self._measurement = measured = merge(gather(self._measurement))
        if measured.unmatched and not measured.batches:
            raise ValueError(
                f"VASCallback saw no forward of the model over batch['input_ids'] in {measured.unmatched} "
                "validation batches, expected validation_step to make one; call the model on the batch "
                "there, or remove VASCallback."
            )
        if measured.unmatched:
            rank_zero_warn(
                f"VASCallback left out {measured.unmatched} of {measured.unmatched + measured.batches} "
                "validation batches: validation_step made no forward over their input_ids."
            )
        scalars = self._scalars(measured)
        for name, value in scalars.items():
            if math.isfinite(value):
                # The same number on every process; sync_dist only says so to Lightning.
                pl_module.log(name, value, prog_bar=name == "val/vas", batch_size=1, sync_dist=True)
        undefined = [name for name, value in scalars.items() if not math.isfinite(value)]
        if undefined and measured.rows:
            rank_zero_warn(
                f"{', '.join(undefined)} undefined and not logged: no sample of this validation has image, "
                "system and query tokens at once."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the JSON and the pictures, now that every `val/*` metric is known."""
        # The sanity check of a resumed run is no baseline: that came with the checkpoint.
        is_baseline = trainer.sanity_checking and self.take_baseline and trainer.global_step == 0
        if _rehearses(trainer) or (trainer.sanity_checking and not is_baseline):
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.latest = metrics
        if is_baseline:
            self.baseline = metrics
            # Lightning drops what is logged during the sanity check, so the loggers get it directly.
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
                logger.save()
        if trainer.is_global_zero and self._measurement.rows:
            report = self._report(trainer, pl_module, metrics)
            write_json(self._folder / f"step_{trainer.global_step:08d}.json", report)
            for number, overlay in enumerate(self._overlays):
                picture = self._folder / f"overlay_{number}.png"
                Image.fromarray(overlay.pixels).save(unfinished := picture.with_suffix(".tmp"), format="PNG")
                os.replace(unfinished, picture)
            log_figures(trainer.loggers, vas_figures(self._measurement, self._overlays), step=trainer.global_step)

    def _scalars(self, measured: Measurement) -> dict[str, float]:
        scalars = {}
        for query in self.queries:
            suffix = "" if query == "user" else f"_{query}"
            scalars[f"val/vas{suffix}"] = measured.mean(query, self.reduction)
            scalars[f"val/vas_ratio_of_means{suffix}"] = measured.mean(query, "ratio_of_means")
            scalars[f"val/image_share{suffix}"] = measured.mean(query, "share")
        return scalars

    def _report(self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]) -> dict[str, Any]:
        measured = self._measurement
        vlm = locate_vlm(pl_module, self.model)
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "baseline": trainer.sanity_checking,
            "model": vlm.config.name_or_path or type(vlm).__name__,
            "reduction": self.reduction,
            "num_samples": len(measured.rows),
            "metrics": metrics,
            "layers": measured.layers,
            **{query: measured.report(query) for query in self.queries},
            "samples": measured.rows,
            "overlays": [{"id": overlay.id, "grid": overlay.grid.tolist()} for overlay in self._overlays],
        }

    def _keep_overlays(
        self,
        pl_module: LightningModule,
        batch: Mapping[str, Any],
        received: AttentionRecord,
        ids: Sequence[Any],
    ) -> None:
        """Keep the image and the attention it received, for as many samples as are still wanted."""
        received_BK = torch.stack([mean.mean(dim=1) for mean in received.received.values()]).mean(dim=0)
        config = locate_vlm(pl_module, self.model).config
        image_processor = getattr(find_processor(pl_module, self.processor), "image_processor", None)
        for index, identifier in enumerate(ids):
            if len(self._overlays) == self.num_overlays:
                return
            try:
                pixels, grid = lay_on_image(
                    received_BK[index],
                    batch,
                    received.role_ids,
                    index,
                    vision_config=getattr(config, "vision_config", None),
                    image_processor=image_processor,
                    square=has_square_images(config.model_type),
                )
            except OverlayError as error:
                if not self._explained:
                    rank_zero_info(f"VASCallback draws no overlay of sample {identifier or index}: {error}.")
                    self._explained = True
            else:
                self._overlays.append(Overlay(identifier, pixels, grid))


def _rehearses(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which suppresses logging and files."""
    return bool(getattr(trainer, "fast_dev_run", False))
