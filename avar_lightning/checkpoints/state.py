"""What a training module adds to a checkpoint, and takes up from it, so that it goes on on any hardware."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import OptimStateKeyType

from avar_lightning.checkpoints.contents import look_into, refuse_other
from avar_lightning.checkpoints.opening import refuse_kind
from avar_lightning.checkpoints.optimizer import by_name, by_number, is_by_name, named_groups

PACE, IMAGE_SIZE = "updates_per_epoch", "image_size"  # names in a checkpoint


def refuse_unfit(trainer: L.Trainer, shapes: Mapping[str, Sequence[int]], trained: Iterable[str]) -> None:
    """Have a trainer refuse checkpoints of other models, of whatever kind, before it loads anything of them.

    All strategies open checkpoints by one method, and only after the model is there; Lightning calls nobody before. So
    this puts `load_checkpoint` of the trainer's strategy, of this one object, behind a check of its own; whoever looks
    for what the strategy does finds it in the class.

    Args:
        trainer: That will load.
        shapes: Of the weights that a checkpoint of this model holds; asked when it is loaded.
        trained: Names of the parameters that train; asked then, too.
    """
    strategy = trainer.strategy
    load = type(strategy).load_checkpoint.__get__(strategy)

    def checked(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        if "://" not in str(checkpoint_path):
            contents = look_into(checkpoint_path, trusted=kwargs.get("weights_only") is False)
            refuse_kind(contents, trainer)
            refuse_other(contents, shapes, trained if trainer.state.fn == "fit" else None)
        return load(checkpoint_path, *args, **kwargs)

    setattr(strategy, "load_checkpoint", checked)  # noqa: B010


def keep_by_name(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Turn optimizers' numbers for parameters into names, which mean the same under every strategy."""
    states, named = checkpoint.get("optimizer_states") or [], []
    for state, optimizer in zip(states, trainer.optimizers, strict=bool(states)):
        if not state.get("param_groups") or is_by_name(state):
            named.append(state)  # empty in a process that writes nothing
        elif trainer.strategy.lightning_restore_optimizer:
            named.append(by_name(state, named_groups(trainer.lightning_module, optimizer)))
        else:
            # Sharding strategies that write one file count parameters as the module does, not as the optimizer does.
            model: Any = trainer.strategy.model
            named.append(FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model))
    if states:
        checkpoint["optimizer_states"] = named


def take_by_number(checkpoint: dict[str, Any], trainer: L.Trainer, groups: Sequence[Sequence[str]]) -> None:
    """The inverse, where the strategy takes numbers: those of the optimizer's `groups` of names.

    Raises:
        ValueError: The checkpoint's optimizer has other groups.
    """
    if trainer.strategy.lightning_restore_optimizer and "optimizer_states" in checkpoint:
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [by_number(state, groups) if is_by_name(state) else state for state in states]


def updates_per_epoch(trainer: L.Trainer) -> float:
    """How many updates an epoch takes with this many processes, batch size, accumulation, and updates of a batch."""
    batches, module = trainer.num_training_batches, cast(Any, trainer.lightning_module)
    if not math.isfinite(batches):
        return math.inf
    updates: int = module.updates_per_batch * math.ceil(batches / trainer.accumulate_grad_batches)
    return updates


def keep_pace(trainer: L.Trainer, then: float | None) -> None:
    """Put the learning rate's schedule where the data are, when an epoch takes more or fewer updates than before.

    Without it, a run on fewer processes would end before its schedule does, and one on more would train at the rate's
    end. A training that is limited by `max_steps` counts updates, whatever they take, and needs nothing.
    """
    now = updates_per_epoch(trainer)
    limited = trainer.max_epochs in (None, -1) or 0 <= trainer.max_steps <= now * (trainer.max_epochs or 0)
    if then is None or then == now or limited or not (math.isfinite(then) and math.isfinite(now)):
        return
    for config in trainer.lr_scheduler_configs:
        schedule: Any = config.scheduler
        before, schedule.last_epoch = schedule.last_epoch, round(schedule.last_epoch * now / then)
        for group, rate in zip(schedule.optimizer.param_groups, schedule.get_lr()):
            group["lr"] = rate
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
        rank_zero_info(
            f"An epoch takes {now} updates, and took {then} before: the learning rate goes on at update "
            f"{schedule.last_epoch} of its schedule, not {before}."
        )


def seed_step(*place: int) -> random.Random:
    """Seed every source of randomness by a place in the training, and give one more.

    Nothing is kept in checkpoints: a run that goes on draws what one that never stopped would have.
    """
    rng = random.Random(" ".join(map(str, (os.environ.get("PL_GLOBAL_SEED", 0), *place))))
    torch.manual_seed(rng.getrandbits(63))
    random.seed(rng.getrandbits(63))
    return rng
