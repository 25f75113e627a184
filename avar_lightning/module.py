"""What the training stages share: a Hugging Face model as a LightningModule, its optimizer, validation and export."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from avar_lightning.checkpoints import (
    IMAGE_SIZE,
    PACE,
    keep_by_name,
    keep_pace,
    plain_name,
    refuse_unfit,
    seed_step,
    take_by_number,
    updates_per_epoch,
    use_whole_files,
)
from avar_lightning.data.collate import IGNORE
from avar_lightning.decoding import greedy
from avar_lightning.export import model_card, write_folder
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import load_processor
from avar_lightning.rewards import judge
from avar_lightning.scoring import ScoringConfig, lm_loss
from avar_lightning.sharding import gathered, load_for_fsdp1, load_sharded, whole_state

# What a batch carries for us and not for the model's forward.
NOT_MODEL_INPUTS = ("role_ids", "prompt", "columns", "images")


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 5e-6
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay; norms, biases and other vectors are spared."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    warmup_fraction: float = 0.03
    """Share of all steps over which the rate climbs from 0, in [0, 1)."""
    min_lr_fraction: float = 0.0
    """Where the cosine ends, as a share of `lr`."""


Config = TypeVar("Config")


def as_config(kind: type[Config], value: Config | dict[str, Any] | None) -> Config:
    """`value` as `kind`; checkpoints keep configurations as plain dicts."""
    return value if isinstance(value, kind) else kind(**(value or {}))  # type: ignore[arg-type]


class VLMModule(L.LightningModule):
    """A vision-language model in training: loads, validates, predicts, optimises and exports it.

    Logs `val/loss` and, when answers are generated, `val/accuracy`; the same under `test/` in a test.

    Args:
        vlm: Which model, and how to load it.
        optimizer: AdamW and its schedule.
        max_new_tokens: Longest greedy answer in validation, test and prediction; 0 generates nothing.
        scoring: How log-probabilities are computed without holding all logits.
    """

    stage = ""
    """Kind of training, whose checkpoints no other one goes on from."""
    model: nn.Module  # a Hugging Face PreTrainedModel, PEFT-wrapped with LoRA; there from `configure_model` on

    def __init__(
        self,
        vlm: VLMConfig | None,
        optimizer: OptimizerConfig | None,
        max_new_tokens: int,
        scoring: ScoringConfig | None = None,
    ) -> None:
        super().__init__()
        self.vlm = as_config(VLMConfig, vlm)
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.max_new_tokens = max_new_tokens
        self.scoring = as_config(ScoringConfig, scoring)
        self.processor = load_processor(self.vlm.pretrained)
        self.validation_loss = MeanMetric()
        self.accuracy = MeanMetric()
        self.seed = 0  # of what is random in training, beside that of `seed_everything`
        self._pace: float | None = None  # of the run that is resumed
        self._shapes: dict[str, torch.Size] = {}  # of what checkpoints hold; empty until the model is there
        self._trained: list[str] = []

    def save_configuration(self, **own: Any) -> None:
        """Keep the configuration in checkpoints, as plain types."""
        shared = {"vlm": asdict(self.vlm), "optimizer": asdict(self.optimizer_config), "scoring": asdict(self.scoring)}
        self.save_hyperparameters(shared | {"max_new_tokens": self.max_new_tokens} | own)

    def configure_model(self) -> None:
        """Load the weights; here and not earlier, so that a sharding strategy can place them."""
        if not hasattr(self, "model"):
            self._refuse_sharding_4_bits()
            # Loaded models come in eval mode, which Lightning would keep: no checkpointing, no adapter dropout.
            self.model = self.load().train()
            # Told apart here, before FSDP flattens every parameter to one dimension.
            self.vectors = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
            # So are shapes, by which checkpoints are known.
            absent = self._base_names() if self.vlm.quantization else set()
            self._shapes |= {plain_name(n): each.shape for n, each in self.state_dict().items() if n not in absent}
            self._trained += [plain_name(n) for n, parameter in self.named_parameters() if parameter.requires_grad]

    def load(self) -> Any:
        """The model as the strategy wants it: whole, or shared among processes, of which one alone reads it."""
        load = partial(load_model, self.vlm)
        strategy = self._trainer.strategy if self._trainer is not None else None
        if isinstance(strategy, FSDPStrategy):
            return load_for_fsdp1(load, strategy)
        if self.device_mesh is None:
            return load()
        copies = self.device_mesh["tensor_parallel"].size()
        if copies > 1:
            raise ValueError(
                f"trainer.strategy has tensor_parallel_size {copies}, expected 1: layers are shared, and not cut; set "
                "it to 1 and data_parallel_size to the number of processes, or use --trainer.strategy fsdp2."
            )
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        offload = getattr(self.trainer.strategy, "cpu_offload", False)
        return load_sharded(load, self.device_mesh["data_parallel"], dtype=dtype, offload=offload)

    def _refuse_sharding_4_bits(self) -> None:
        strategy = type(self._trainer.strategy if self._trainer else None).__name__
        if self.vlm.quantization and any(name in strategy for name in ("FSDP", "ModelParallel", "DeepSpeed")):
            raise ValueError(
                f"trainer.strategy is {strategy}, which cannot share 4-bit weights among processes, expected ddp (or "
                "auto), where each holds them all; set it, or leave vlm.quantization out (--config configs/lora.yaml)."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what other processes need to go on; leave a 4-bit base out, which is loaded again from where it was."""
        checkpoint["stage"] = self.stage
        keep_by_name(checkpoint, self.trainer)
        checkpoint[PACE] = updates_per_epoch(self.trainer)
        checkpoint[IMAGE_SIZE] = dict(getattr(self.processor.image_processor, "size", None) or {})
        if self.vlm.quantization and "state_dict" in checkpoint:
            if self.vlm.from_scratch:
                raise ValueError(
                    "vlm.from_scratch with vlm.quantization makes random weights that no checkpoint keeps, expected "
                    "trained ones under the adapters; set vlm.from_scratch false."
                )
            base = self._base_names()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in base}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; those of a 4-bit base may be absent, since they are there already, and no others.

        Raises:
            ValueError: Under `quantization`, an adapter is missing, unknown or of another shape.
        """
        if not self.vlm.quantization:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        base = self._base_names()
        adapters = {name: tensor for name, tensor in state_dict.items() if name not in base}
        try:
            found = super().load_state_dict(adapters, strict=False, assign=assign)
        except RuntimeError as error:
            raise ValueError(_misfit(" ".join(str(error).split()))) from error
        missing = sorted(set(found.missing_keys) - base)
        if strict and (missing or found.unexpected_keys):
            raise ValueError(_misfit(f"missing {missing}, unknown {found.unexpected_keys}"))
        return found

    def _base_names(self) -> set[str]:
        """Names of everything in the model's state that does not train."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {f"model.{name}" for name in self.model.state_dict() if name not in trained}

    def setup(self, stage: str) -> None:
        """Take the data's processor, whose limits on pixels are those that the exported model needs."""
        self.processor = getattr(getattr(self.trainer, "datamodule", None), "processor", self.processor)
        use_whole_files(self.trainer)
        refuse_unfit(self.trainer, self._shapes, self._trained)

    def on_train_start(self) -> None:
        """Go on at the learning rate that belongs to the place in the data."""
        keep_pace(self.trainer, self._pace)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let all that is random in a step hang on its number, so that a resumed run draws what it would have.

        Gradients of the last step are dropped here, when everybody has seen them. Lightning does it just before the
        backward, so that they would lie beside the activations of the forward, and beside what is sampled.
        """
        part = batch_idx % self.trainer.accumulate_grad_batches
        self.rng = seed_step(self.seed, self.global_step, part, self.global_rank)
        if part == 0:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what was kept for other processes.

        Raises:
            ValueError: Another kind of training is to go on.
        """
        stage = checkpoint.get("stage", self.stage)
        if stage != self.stage and self._trainer is not None and self.trainer.state.fn == "fit":
            raise ValueError(
                f"The checkpoint is one of {stage}, and {self.stage} cannot go on from its optimizer and schedule; "
                "export it (avar export CHECKPOINT FOLDER) and start from there (--model.init_args.vlm.pretrained "
                "FOLDER)."
            )
        self._pace = checkpoint.get(PACE)
        if self._trainer is not None:
            groups = [[name for name, _ in group] for group in self.parameter_groups()]
            take_by_number(checkpoint, self.trainer, groups)

    def forward(self, batch: dict[str, Any]) -> Any:
        """The model's own output for a collated batch, LM loss included where it has labels."""
        inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
        return self.model(**inputs, use_cache=False)

    def lm_loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of a collated batch, summed over its labelled tokens, and their number."""
        inputs = {name: value for name, value in batch.items() if name not in (*NOT_MODEL_INPUTS, "labels")}
        return lm_loss(self.model, inputs, batch["labels"], config=self.scoring)

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """Mean of a tensor over the processes, without a gradient; a collective call."""
        return self.over_processes(values, "mean")

    def over_processes(self, values: Tensor, how: str) -> Tensor:
        """The `sum`, `mean` or `max` of a tensor over the processes, without a gradient; a collective call."""
        reduced: Any = self.trainer.strategy.reduce(values.detach().clone(), reduce_op=how)
        return reduced

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """LM loss of the reference responses, and accuracy of generated ones.

        Prompts alone need no forward in a test; in a validation callbacks may watch it, and processes make it together.
        """
        size = len(batch["input_ids"])
        stage = "test" if self.trainer.testing else "val"
        if stage == "val" or self.trainer.world_size > 1 or (batch["labels"] != IGNORE).any():
            total, count = self.lm_loss(batch)
            if count:  # a batch of prompts without reference responses has no loss
                self.validation_loss.update(total / count, weight=count)
            self.log(f"{stage}/loss", self.validation_loss, batch_size=size)
        if self.max_new_tokens:
            self._score(self.generate(batch), batch["columns"])
            self.log(f"{stage}/accuracy", self.accuracy, prog_bar=True, batch_size=size)

    def _score(self, completions: list[str], columns: list[dict[str, Any]]) -> None:
        if all(column.get("answer") in (None, "") for column in columns):
            raise ValueError(
                "No sample of a validation batch has an 'answer', expected one to score generated answers against; add "
                "answers to the shards, or set --model.init_args.max_new_tokens 0."
            )
        # A sample that only fills up another rank's last batch is scored where it belongs.
        own = [not column.get("repeated") for column in columns]
        scored = [value for value, counts in zip(judge(completions, columns), own) if counts and value is not None]
        if scored:
            self.accuracy.update(torch.tensor(scored))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Each sample's columns (id, answer, source, …) with its greedy `completion`.

        Raises:
            ValueError: `max_new_tokens` is 0.
        """
        if not self.max_new_tokens:
            raise ValueError(
                "max_new_tokens is 0, expected 1 or more to predict; set --model.init_args.max_new_tokens."
            )
        completions = self.generate(batch)
        answered = zip(batch["columns"], completions)
        return [columns | {"completion": text} for columns, text in answered if not columns.get("repeated")]

    @torch.no_grad()
    def generate(self, batch: dict[str, Any]) -> list[str]:
        """Greedy completions of a batch's prompts (`batch["prompt"]`, left-padded; images come from the batch)."""
        sequences = ("input_ids", "attention_mask", "labels", *batch["prompt"])
        shared = {k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS and k not in sequences}
        prompt = {k: v for k, v in batch["prompt"].items() if k not in NOT_MODEL_INPUTS}
        with gathered(self.model):
            tokens = self.model.generate(  # type: ignore[operator]
                **prompt,
                **shared,
                **greedy(self.model, self.processor, max_new_tokens=self.max_new_tokens),
            )
        return self.processor.batch_decode(tokens[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    @property
    def updates_per_batch(self) -> int:
        """Of the optimizer, where gradients are not accumulated."""
        return 1

    def num_optimizer_steps(self) -> float:
        """Updates of the whole training, infinite where the data's length is unknown."""
        steps = self.trainer.estimated_stepping_batches
        # Lightning has set the data up for it, too early to give them the position of a checkpoint: let it do so again.
        self.trainer.fit_loop._combined_loader = None
        return steps

    def parameter_groups(self) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
        """What trains, by name: what decays, and vectors, which do not."""
        trained = [(plain_name(name), p) for name, p in self.named_parameters() if p.requires_grad]
        spared = [each for each in trained if each[0] in self.vectors]
        return [each for each in trained if each[0] not in self.vectors], spared

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the parameters that train, with warm-up and cosine by step."""
        config = self.optimizer_config
        steps = self.num_optimizer_steps()
        if not math.isfinite(steps):
            raise ValueError(
                f"The number of training steps is {steps}, expected a finite one for the cosine schedule; set "
                "trainer.max_steps, or train on shards with a manifest and set trainer.max_epochs."
            )
        decayed, spared = ([parameter for _, parameter in group] for group in self.parameter_groups())
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, round(config.warmup_fraction * steps), int(steps), min_lr_rate=config.min_lr_fraction
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, folder: str | Path, run: Path | None = None) -> Path:
        """Write a Hugging Face folder (model or adapters, processor, card) that opens without this project.

        A collective call, where there are several processes; the first writes. `run` is the folder of the training run,
        whose measurements the card tells.
        """
        folder, options = Path(folder), whole_state(self.model)
        if not dist.is_initialized() or dist.get_rank() == 0:
            name = folder.name if run is None else f"{run.parent.name} {run.name}"
            about: dict[str, Any] = {"base": self.vlm.pretrained, "run": run, "settings": dict(self.hparams)}
            card = model_card(name, adapters=self.vlm.lora is not None, **about)
            write_folder(folder, self.model, self.processor, card=card, run=run, **options)
        return folder


def _misfit(how: str) -> str:
    return (
        f"The checkpoint does not fit the adapters ({how}), expected every one of theirs; give the vlm.lora that it "
        "was trained with."
    )
