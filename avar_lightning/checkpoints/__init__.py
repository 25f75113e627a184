"""Checkpoints of training: whole at any moment, and open to other hardware than they were saved on."""

from avar_lightning.checkpoints.contents import Contents, is_checkpoint, load_weights, look_into, refuse_other
from avar_lightning.checkpoints.opening import refuse_kind, use_whole_files
from avar_lightning.checkpoints.optimizer import by_name, by_number, plain_name
from avar_lightning.checkpoints.replacing import beside, put, recover, remove, replaced, room_for, sweep
from avar_lightning.checkpoints.state import (
    IMAGE_SIZE,
    PACE,
    keep_by_name,
    keep_pace,
    refuse_unfit,
    seed_step,
    take_by_number,
    updates_per_epoch,
)

__all__ = [
    "IMAGE_SIZE",
    "PACE",
    "Contents",
    "beside",
    "by_name",
    "by_number",
    "is_checkpoint",
    "keep_by_name",
    "keep_pace",
    "load_weights",
    "look_into",
    "plain_name",
    "put",
    "recover",
    "refuse_kind",
    "refuse_other",
    "refuse_unfit",
    "remove",
    "replaced",
    "room_for",
    "seed_step",
    "sweep",
    "take_by_number",
    "updates_per_epoch",
    "use_whole_files",
]
