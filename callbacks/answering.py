"""What callbacks share that let any LightningModule's model answer the prompts of a validation or a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from avar_lightning import interventions
from avar_lightning.callbacks.foreign import find_processor, find_role_ids, locate_vlm
from avar_lightning.callbacks.measurement import QUERIES
from avar_lightning.processing import padding_id


@dataclass
class Asked:
    """A batch as it is asked."""

    vlm: Any
    processor: Any
    role_ids: Tensor
    """Of the batch (B, N)."""
    prompt: dict[str, Any]
    """Of `interventions.prompt_of`."""


class AnsweringCallback(Callback):
    """Leads every validation and test through `_start`, `_answer` for each batch, and `_finish`.

    Attributes:
        processor: Decodes, and tells roles of batches without them; found in module or datamodule when unset.
        model: Attribute path of the VLM in the LightningModule, for a module that holds several.
    """

    processor: Any
    model: str | None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready."""
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Answer the batch."""
        self._answer(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Answer the batch."""
        self._answer(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the processes, sum up, log and write."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the processes, sum up, log and write."""
        self._finish(trainer, pl_module, "test")

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise NotImplementedError

    def _answer(self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise NotImplementedError

    def _measures(self, trainer: Trainer) -> bool:
        """Whether this is `trainer.validate` or `trainer.test`, and not a validation within a fit.

        Raises:
            ValueError: It is, under a strategy that cannot generate here.
        """
        measures = trainer.state.fn in ("validate", "test")
        if measures and isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                f"strategy fsdp keeps weights sharded outside of the module's forward, where {type(self).__name__} "
                "generates; use fsdp2 (ModelParallelStrategy), DDP or one device."
            )
        return measures

    def _ask(self, pl_module: LightningModule, batch: Mapping[str, Any]) -> Asked:
        processor = find_processor(pl_module, self.processor)
        if processor is None:
            raise ValueError(
                f"neither {type(pl_module).__name__} nor its datamodule has a `processor` or `tokenizer` to decode "
                f"answers with; set one, or give {type(self).__name__} a `processor`."
            )
        vlm = locate_vlm(pl_module, self.model)
        role_ids = find_role_ids(batch, pl_module, processor)
        prompt = interventions.prompt_of(batch, role_ids, vlm, padding_id(processor))
        return Asked(vlm, processor, role_ids, prompt)


def query_roles(queries: Sequence[str] | str | None) -> Any:
    """Rows to steer as `steer_attention` takes them: roles, `last`, or None for every row.

    Raises:
        ValueError: A name is unknown, or there is none.
    """
    if queries is None or isinstance(queries, str):
        return queries
    if not queries or set(queries) - set(QUERIES):
        raise ValueError(f"queries={list(queries)!r}, expected one or both of {list(QUERIES)}, or last.")
    return tuple(QUERIES[name] for name in queries)
