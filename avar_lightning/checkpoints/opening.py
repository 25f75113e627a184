"""How single processes and DDP read and write checkpoints: files that are whole or not there, and folders of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from avar_lightning.checkpoints.contents import Contents
from avar_lightning.checkpoints.replacing import beside, put, recover, room_for

HINT = "free space, or save elsewhere; what was saved before is whole."


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's, with a file that is streamed beside its place and then renamed, and with folders of FSDP.

    Lightning's own makes a second copy of everything in memory, writes it to the system's temporary folder and moves it
    from there, which is a copy, not a rename, wherever that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; whoever is killed leaves the old one."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with room_for(path, HINT):
            with beside(path).open("wb") as file:  # a file of Python's says why it cannot be written
                torch.save(checkpoint, file)
            put(beside(path), path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or a folder that another strategy wrote."""
        if "://" not in str(path):
            recover(path)
            if Path(path).is_dir():
                return _joined(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def use_whole_files(trainer: L.Trainer) -> None:
    """Have a trainer read and write checkpoints so, unless it was given a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()


def refuse_kind(contents: Contents, trainer: L.Trainer) -> None:
    """Refuse a folder that only another sharding strategy reads.

    Raises:
        ValueError: The trainer's strategy cannot open it.
    """
    opens = {FSDPStrategy: ("file", "FSDP folder"), ModelParallelStrategy: ("file", "FSDP2 folder")}
    for strategy, kinds in opens.items():
        if isinstance(trainer.strategy, strategy) and contents.kind not in kinds:
            other = {"FSDP folder": "FSDPStrategy", "FSDP2 folder": "ModelParallelStrategy"}[contents.kind]
            raise ValueError(
                f"{str(contents.path)!r} is a folder of {other}, which {strategy.__name__} does not read; resume with "
                f"{other}, with DDP or on one process, or export it (avar export) and train from that."
            )


def _joined(path: Path) -> dict[str, Any]:
    """A folder's weights and optimizers, put together in memory as a file has them."""
    saved = _load_distributed_checkpoint(path)
    saved["state_dict"] = saved.pop("state_dict") if "state_dict" in saved else saved.pop("model")
    number, states = 0, []
    while f"optimizer_{number}" in saved:
        states.append(saved.pop(f"optimizer_{number}"))
        number += 1
    return {**saved, "optimizer_states": states}
