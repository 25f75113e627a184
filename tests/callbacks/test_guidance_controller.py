import math

import lightning as L
import pytest

from avar_lightning.callbacks import GuidanceController
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.sft import SFTModule


class Watch(L.Callback):
    """What the module used in each step, and what it logged."""

    def __init__(self):
        self.used, self.vas = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.used.append((pl_module.guidance.alpha, pl_module.guidance.beta))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.vas.append(float(trainer.callback_metrics["train/vas_ratio_of_means"]))


def train(data, controller, steps=4, guidance=None, lr=0.0):
    module = SFTModule(guidance=guidance or GuidanceConfig("published", 0.2, 0.1), optimizer=OptimizerConfig(lr=lr))
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[watch, controller],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module, watch


def test_weights_follow_the_law_that_is_written_down(make_data):
    module, watch = train(make_data(batch_size=2), GuidanceController(2.0, gain=0.7, smoothing=0.6))
    factor, smooth = 1.0, math.log(watch.vas[0])
    for (alpha, beta), vas in zip(watch.used, watch.vas):
        assert alpha == pytest.approx(0.2 * factor)
        assert beta == pytest.approx(0.1 * factor)
        smooth = 0.6 * smooth + 0.4 * math.log(vas)
        factor = 0.7 * (math.log(2.0) - smooth)
    assert 0.01 < watch.used[-1][0] < 0.2
    assert (module.guidance.alpha, module.guidance.beta) == (0.2, 0.1)


@pytest.mark.parametrize(("target", "factor"), [(1e9, 1.0), (1e-9, 1e-3)])
def test_weights_stay_within_their_bounds(make_data, target, factor):
    watch = train(make_data(batch_size=2), GuidanceController(target), steps=2)[1]
    assert watch.used[-1][0] == pytest.approx(0.2 * factor)


@pytest.mark.slow
def test_it_holds_a_target_that_the_published_form_leaves_behind(make_data):
    def late(target):
        guidance = GuidanceConfig("published", queries=["response"])
        data = make_data(batch_size=8, num_train=640)
        return sum(train(data, GuidanceController(target), 80, guidance, lr=1e-3)[1].vas[-10:]) / 10

    held, free = late(2.0), late(1e9)
    assert 1.5 < held < 2.3
    assert free > 1.5 * held


def test_it_resumes_where_it_was():
    one, two = GuidanceController(3.0), GuidanceController(3.0)
    one.factor, one.log_vas = 0.3, 1.2
    two.load_state_dict(one.state_dict())
    assert (two.factor, two.log_vas) == (0.3, 1.2)


def test_a_module_without_guidance_is_refused(make_data):
    with pytest.raises(ValueError, match="no active guidance in SFTModule"):
        train(make_data(batch_size=2), GuidanceController(3.0), guidance=GuidanceConfig(form="none"))


@pytest.mark.parametrize("options", [{"target": 0}, {"target": 1, "gain": 0}, {"target": 1, "smoothing": 1.0}])
def test_arguments_without_a_meaning_are_named(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]}="):
        GuidanceController(**options)
