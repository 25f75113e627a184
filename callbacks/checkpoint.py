"""Checkpoints that a kill at any moment leaves whole, under every strategy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from avar_lightning.checkpoints import beside, put, recover, remove, room_for, sweep


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, with the same arguments, for files and for the folders that FSDP writes.

    A checkpoint is written beside its place and renamed when it is whole, and renamed before it is deleted; what killed
    runs left is removed by the next one in the same folder. A full disk ends the run with a sentence. A checkpoint that
    is due between two updates waits for the next one, since gradients that are being accumulated are not kept. A run
    that goes on in another folder knows the best checkpoints of the folder before, and leaves them there.
    `ckpt_path: last` is the newest of all versions of this run.

    With `save_last: link`, `last.ckpt` leads to the newest checkpoint at any moment, and takes space of its own only
    where the newest is none of the best.
    """

    _due = False
    _asked: int | None = None  # the step at which a checkpoint was last due

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and tidy up what was left there."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._is_local:
            if trainer.is_global_zero:
                sweep(str(self.dirpath), self.FILE_EXTENSION)
            trainer.strategy.barrier()

    @property
    def _is_local(self) -> bool:
        return "://" not in str(self.dirpath)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save when it is due, and the gradients of an update are complete."""
        if trainer.fit_loop._should_accumulate():
            return
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._due:
            self._due = False
            super().on_validation_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when it is due, or after the next update where gradients are being accumulated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.fit_loop._should_accumulate():
            self._due = True
            return
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a last one where none was due, but when a run is only tried."""
        if not getattr(trainer, "fast_dev_run", False):
            super().on_train_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which checkpoints are the best, wherever they lie."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not self._is_local:
            super()._save_checkpoint(trainer, filepath)
            return
        unfinished = beside(filepath)
        if trainer.is_global_zero:
            remove(unfinished)
        trainer.strategy.barrier()
        with room_for(filepath, "free space, or set dirpath to another disk; what was saved before is whole."):
            super()._save_checkpoint(trainer, str(unfinished))
            if trainer.is_global_zero:
                put(unfinished, filepath)
        trainer.strategy.barrier()
        self._last_checkpoint_saved = filepath

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._asked = trainer.global_step
        if self.save_last == "link" and not self.last_model_path:
            # Whoever goes on from what is saved now is to know this name as its own.
            path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
            self.last_model_path = "" if self.file_exists(path, trainer) else path
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last == "link" and self._last_global_step_saved != trainer.global_step:
            if self._last_checkpoint_saved and self._asked != trainer.global_step:
                return
            self._last_checkpoint_saved = ""  # the newest is none of the best, so there is nothing to lead to
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self.save_last == "link" and os.path.islink(self.last_model_path) and self._last_checkpoint_saved:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, self.last_model_path)
        if "://" in filepath:
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            remove(filepath)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            unfinished = beside(linkpath)
            remove(unfinished)
            unfinished.symlink_to(os.path.relpath(filepath, os.path.dirname(linkpath)))
            put(unfinished, linkpath)
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """The last checkpoints of every version of this run, since one that goes on is a version of its own."""
        given, folders = self.dirpath, list[Any]()
        logger = trainer.logger
        if given is None and logger is not None and isinstance(logger.version, int):
            root = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
            folders = sorted(root.glob("version_*/checkpoints"))
        found = set[str]()
        for folder in folders or [given]:
            self.dirpath = folder
            if folder is not None:
                for old in Path(folder).glob(f"{self.CHECKPOINT_NAME_LAST}*.old"):
                    recover(old.with_suffix(""))
            found |= super()._find_last_checkpoints(trainer)
        self.dirpath = given
        return found
