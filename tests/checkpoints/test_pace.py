"""The learning rate's schedule where an epoch takes another number of updates than before."""

from types import SimpleNamespace

import pytest
import torch

from avar_lightning.checkpoints import keep_pace, updates_per_epoch
from avar_lightning.grpo import GRPOConfig, GRPOModule
from avar_lightning.model import VLMConfig


def trainer(module, batches, *, at, max_steps=-1, max_epochs=3):
    """What is asked of a Trainer, with a schedule that has come to update `at`."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda step: 1 - step / 2000
    )
    schedule.last_epoch = at
    limits = {"max_steps": max_steps, "max_epochs": max_epochs, "accumulate_grad_batches": 1}
    configs = [SimpleNamespace(scheduler=schedule)]
    return SimpleNamespace(
        lightning_module=module, num_training_batches=batches, lr_scheduler_configs=configs, **limits
    )


@pytest.mark.parametrize(("max_steps", "wanted"), [(-1, 250), (1000, 500), (1200, 500), (1201, 250)])
def test_grpo_counts_updates_and_not_batches(max_steps, wanted):
    """An epoch of 200 batches is one of 100 now, of 4 updates each: 3 of them are 1200 updates."""
    module = GRPOModule(VLMConfig("demo"), GRPOConfig(num_epochs=2, num_minibatches=2))
    then = updates_per_epoch(trainer(module, 200, at=0))
    assert then == 800
    now = trainer(module, 100, at=500, max_steps=max_steps)
    keep_pace(now, then)
    assert now.lr_scheduler_configs[0].scheduler.last_epoch == wanted
