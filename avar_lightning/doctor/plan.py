"""What a configuration asks for, in the terms of an estimate; a fix is another plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from avar_lightning.guidance import GuidanceConfig
from avar_lightning.model import VLMConfig
from avar_lightning.scoring import ScoringConfig

Strategy = Literal["single", "ddp", "fsdp1", "fsdp2"]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample.

    Attributes:
        longest: Of the longest one, which decides memory; for prompts, without their completion.
        mean: Of the mean one, which decides time.
        images: Image tokens among the longest.
        mean_images: Image tokens among the mean.
        responses: Share of tokens that carry loss.
        source: Where these numbers come from.
    """

    longest: int
    mean: float
    images: int
    mean_images: float
    responses: float
    source: str


@dataclass(frozen=True)
class Rollout:
    """Sampling and updates of GRPO.

    Attributes:
        num_generations: Completions of each prompt.
        num_epochs: Times that they are learned from.
        num_minibatches: Updates in each of these.
        new_tokens: Longest completion.
        batch_size: Completions that are sampled together in this process; None for all.
        in_process: Whether the model itself samples, and not a server.
        has_reference: Whether a frozen copy is kept for the KL.
        scores_all: Whether a pass without gradient goes over all completions before the update.
        kl: Whether another such pass goes over the reference.
    """

    num_generations: int
    num_epochs: int
    num_minibatches: int
    new_tokens: int
    batch_size: int | None
    in_process: bool
    has_reference: bool
    scores_all: bool
    kl: bool


@dataclass(frozen=True)
class Plan:
    """One training run.

    Attributes:
        vlm: Which model, and how it is loaded.
        guidance: Attention that is recorded with a gradient; None for none.
        scoring: How logits are made.
        rollout: Of GRPO; None for SFT.
        strategy: How processes work together.
        shards: Processes that share one copy of the weights.
        offload: Whether weights, gradients and optimiser states stay in host memory.
        reshard: Whether gathered weights are let go between forward and backward.
        devices: A node.
        num_nodes: Nodes.
        precision: Of the trainer.
        batch_size: Samples (GRPO: prompts) of one process in a batch.
        micro_batch: Sequences in one forward.
        accumulate: Batches for one update.
        max_pixels: Most pixels of an image, None for the processor's own.
        lengths: Tokens of a sample.
        num_samples: Of the training data, where it is known.
        max_steps: Updates at most, -1 for no limit.
        max_epochs: Passes over the data at most, None or -1 for no limit.
        num_workers: Reading processes of each process.
        kept_checkpoints: Checkpoints that are on disk at the same time at most.
    """

    vlm: VLMConfig
    guidance: GuidanceConfig | None
    scoring: ScoringConfig
    rollout: Rollout | None
    strategy: Strategy
    shards: int
    offload: bool
    reshard: bool
    devices: int
    num_nodes: int
    precision: str
    batch_size: int
    micro_batch: int
    accumulate: int
    max_pixels: int | None
    lengths: Lengths
    num_samples: int | None
    max_steps: int
    max_epochs: int | None
    num_workers: int
    kept_checkpoints: int

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.devices * self.num_nodes

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in products."""
        if self.precision in ("bf16-mixed", "16-mixed", "bf16-true", "16-true"):
            return 2
        if self.precision in ("64-true",):
            return 8
        return 4 if self.vlm.dtype == "float32" else 2

    @property
    def is_mixed(self) -> bool:
        """Whether autocast chooses the dtype of each operation."""
        return self.precision.endswith("-mixed")

    @property
    def is_float16(self) -> bool:
        """Whether products are float16's."""
        return self.precision.startswith("16")

    @property
    def is_sharded(self) -> bool:
        """Whether processes share the weights."""
        return self.strategy.startswith("fsdp")

    @property
    def sequence(self) -> int:
        """Tokens of the longest sequence in a forward that learns."""
        return self.lengths.longest + (self.rollout.new_tokens if self.rollout else 0)

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one update learns from, over all processes."""
        if self.rollout is None:
            return self.batch_size * self.accumulate * self.world_size
        return self.batch_size * self.rollout.num_generations * self.world_size // self.rollout.num_minibatches


def strategy_of(value: Any) -> tuple[Strategy | None, Mapping[str, Any]]:
    """The kind of a trainer's strategy and its options; None for `auto`.

    Raises:
        ValueError: A strategy of which nothing is known here.
    """
    name, options = (value, {}) if isinstance(value, str) else (value["class_path"], value.get("init_args") or {})
    name = str(name).rpartition(".")[2]
    if name == "auto":
        return None, options
    kinds: tuple[tuple[Strategy, tuple[str, ...]], ...] = (
        ("fsdp1", ("fsdp", "FSDPStrategy")),
        ("fsdp2", ("fsdp2", "fsdp2_cpu_offload", "FSDP2Strategy", "ModelParallelStrategy")),
        ("ddp", ("ddp", "DDPStrategy")),
        ("single", ("SingleDeviceStrategy",)),
    )
    for kind, names in kinds:
        if name in names or (kind in ("ddp", "fsdp1") and name.startswith((f"{names[0]}_",))):
            if name.endswith("_cpu_offload"):
                options = {"cpu_offload": True}
            # One dimension of all processes, however many.
            return kind, {"data_parallel_size": "all", **options} if name in names[:3] and kind == "fsdp2" else options
    raise ValueError(
        f"trainer.strategy {name!r} cannot be estimated, expected auto, ddp, fsdp, fsdp2, FSDPStrategy, "
        "FSDP2Strategy, ModelParallelStrategy or SingleDeviceStrategy; choose one of these."
    )
