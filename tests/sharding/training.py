"""Trainings on one process, or by torchrun on several; each writes down what it came to."""

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from PIL import Image
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from avar_lightning import GRPOModule, SFTModule
from avar_lightning.callbacks import VASCallback
from avar_lightning.data import ShardDataModule
from avar_lightning.data.sample import Sample
from avar_lightning.data.writer import write_shards
from avar_lightning.grpo import GRPOConfig
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.model import LoRAConfig, VLMConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.processing import load_processor, resolve_pretrained
from avar_lightning.quantization import QuantizationConfig
from avar_lightning.rewards import RewardConfig, VisualAttentionReward
from avar_lightning.rollout import SamplingConfig
from avar_lightning.strategies import FSDP2Strategy
from tests.grpo.test_grpo_module import Fixed, right_reward


class FSDP1Strategy(FSDPStrategy):
    """Lightning's, on a CPU: it refuses its own class there, by name alone, and gives torch no device."""

    def __init__(self):
        units = {Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock}
        super().__init__(auto_wrap_policy=units, state_dict_type="sharded")

    def _setup_model(self, model):
        _init_utils._check_module_states_for_sync_module_states = lambda *_: None  # that they are on a GPU
        precision = self.mixed_precision_config
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), mixed_precision=precision, **self.kwargs)


STRATEGIES = {
    "one": lambda: "auto",
    "ddp": DDPStrategy,
    "fsdp2": FSDP2Strategy,
    "fsdp1": FSDP1Strategy,
    "offload": lambda: FSDP2Strategy(cpu_offload=True),
    "model_parallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


@dataclass
class Case:
    """One training."""

    strategy: str = "fsdp2"
    form: str = "published"
    kind: str = "sft"
    lora: bool = False
    four_bits: bool = False
    precision: str = "32-true"
    checkpointing: bool = False
    clip: float = 0.0
    images: int = 1  # in 8 samples
    beta: float = 0.0
    tied: bool = True  # embeddings and head
    answers: int = 0  # longest


CASES = {
    "published": Case(answers=5),
    "adapters": Case(form="hinge", lora=True, checkpointing=True, clip=0.01),
    "grpo": Case(form="none", kind="grpo", images=2),
    "ddp": Case("ddp", form="share"),
    "no_images": Case(images=0),
    "fsdp1": Case("fsdp1", form="hinge", images=3, answers=5),
    "fsdp1_untied": Case("fsdp1", form="published", tied=False, checkpointing=True, clip=0.01, answers=5),
    "fsdp1_bf16": Case("fsdp1", precision="bf16-mixed", images=3),
    "untied": Case(form="hinge", tied=False),
    "bf16": Case(precision="bf16-mixed", images=3),
    "offload": Case("offload", images=3, clip=0.01),
    "model_parallel": Case("model_parallel", form="share", images=8),
    "ddp_grpo": Case("ddp", form="none", kind="grpo"),
    "grpo_reference": Case(form="none", kind="grpo", beta=0.1),
    "ddp_no_images": Case("ddp", images=0),
    "ddp_4_bits": Case("ddp", form="share", lora=True, four_bits=True, checkpointing=True),
}


def write_samples(folder, images):
    """24 samples of different lengths, `images` in each 8 with a picture; another 5 to validate on."""

    def sample(index):
        shows = index % 8 < images
        parts = [{"type": "image"}] * shows + [{"type": "text", "text": f"Which cell has number {index}?"}]
        messages = [
            {"role": "system", "content": "Look at the image."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": " ".join(["red", "circle"][: 1 + index % 2] * (1 + index % 5))},
        ]
        pictures = [Image.effect_noise((84, 84), 90).convert("RGB")] * shows
        return Sample(messages, pictures, answer="red", id=f"s{index}", columns={"index": index})

    write_shards(map(sample, range(24)), folder / "train", overwrite=True)
    write_shards(map(sample, range(5)), folder / "val", overwrite=True)


class Record(L.Callback):
    """Keeps where it began, the gradients of the first update as they came and clipped, and what was logged of each."""

    def __init__(self):
        self.start, self.gradients, self.clipped, self.logged = {}, {}, {}, []

    def on_train_start(self, trainer, pl_module):
        with whole_parameters(trainer) as named:
            self.start = {n: whole(p.detach()).clone() for n, p in named.items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.gradients:
            with whole_parameters(trainer) as named:
                self.gradients = {n: whole(p.grad).clone() for n, p in named.items() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, *_):
        metrics = trainer.callback_metrics.items()
        self.logged.append({n: float(v) for n, v in metrics if not n.startswith(("val/", "time/"))})
        if not self.clipped:
            with whole_parameters(trainer) as named:
                self.clipped = {n: whole(p.grad).clone() for n, p in named.items() if p.grad is not None}


@contextmanager
def whole_parameters(trainer):
    """Parameters by the names that they have in one process."""
    root = trainer.strategy.model
    is_fsdp1 = isinstance(root, FullyShardedDataParallel)
    gathering = FullyShardedDataParallel.summon_full_params(root, with_grads=True) if is_fsdp1 else nullcontext()
    with gathering:
        named = trainer.lightning_module.named_parameters()
        yield {name.replace("_fsdp_wrapped_module.", ""): parameter for name, parameter in named}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_module(case, folder):
    base = folder / ("base" if case.tied else "untied")
    vlm = VLMConfig(str(base), gradient_checkpointing=case.checkpointing)
    if case.lora:
        vlm = replace(vlm, lora=LoRAConfig(r=2), quantization=QuantizationConfig() if case.four_bits else None)
    optimizer = OptimizerConfig(lr=1e-3, warmup_fraction=0.0)
    torch.manual_seed(3)
    if case.kind == "sft":
        return SFTModule(vlm, GuidanceConfig(form=case.form), optimizer, case.answers)
    grpo = GRPOConfig(num_generations=4, micro_batch_size=3, max_grad_norm=0.0, beta=case.beta)
    rewards = [RewardConfig(right_reward, name="accuracy")]
    visual = VisualAttentionReward("share")
    return GRPOModule(vlm, grpo, SamplingConfig(max_new_tokens=6), rewards, visual, Fixed(), optimizer)


def train(case, folder, world_size):
    """Three updates on 8 samples each (of GRPO: one on 4 prompts), and a validation."""
    grpo = case.kind == "grpo"
    size = 4 if grpo else 8
    shards = folder / f"{case.images}_images"
    data = ShardDataModule(
        str(shards / "train"),
        str(shards / "val"),
        processor=str(folder / "base"),
        batch_size=size // world_size,
        val_batch_size=2,
        num_workers=0,
        shuffle_window=0,
        train_prompts=grpo,
    )
    record, measuring = Record(), VASCallback(baseline=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=STRATEGIES[case.strategy](),
        precision=case.precision,
        max_steps=1 if grpo else 3,
        val_check_interval=1 if grpo else 3,
        num_sanity_val_steps=0,
        gradient_clip_val=case.clip or None,
        enable_checkpointing=False,
        callbacks=[record, measuring],
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = make_module(case, folder)
    trainer.fit(module, data)
    with whole_parameters(trainer) as named:
        weights = {n: whole(p.detach()).clone() for n, p in named.items()}
    measured = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    found = {"start": record.start, "weights": weights, "gradients": record.gradients, "clipped": record.clipped}
    buffers = {n.replace("_fsdp_wrapped_module.", ""): b for n, b in module.model.named_buffers()}
    return found | {"logged": record.logged, "measured": measured, "buffers": buffers}


def prepare(folder, cases):
    """What all processes read: a base with random weights, adapters included, and samples."""
    config = AutoConfig.from_pretrained(resolve_pretrained("demo"))
    for name, tied in (("base", True), ("untied", False)):
        torch.manual_seed(7)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        model = AutoModelForImageTextToText.from_config(config)
        model.generation_config.repetition_penalty = 1.3  # which a model made from its configuration alone has not
        model.save_pretrained(folder / name)
        load_processor("demo").save_pretrained(folder / name)
    for images in {case.images for case in cases.values()}:
        write_samples(folder / f"{images}_images", images)


def main(folder, names):
    torch.set_num_threads(1)
    for name in names:
        found = train(CASES[name], folder, 2)
        torch.save(found, folder / f"{name}_{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
