"""What would make a plan fit: changes of it, from the cheapest on, each with its option and its new estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from avar_lightning.doctor.hardware import Device
from avar_lightning.doctor.memory import Memory, memory
from avar_lightning.doctor.plan import Plan
from avar_lightning.doctor.shape import Shape
from avar_lightning.model import LoRAConfig, VLMConfig
from avar_lightning.quantization import QuantizationConfig

ShapeOf = Callable[[VLMConfig], Shape]
MIN_PIXELS = 256 * 28**2
"""Fewer make pictures of documents unreadable."""
SAMPLED_TOGETHER = 8


@dataclass(frozen=True)
class Fix:
    """A change of a plan.

    Attributes:
        option: What to add to the command.
        cost: What it costs.
        plan: The changed plan.
    """

    option: str
    cost: str
    plan: Plan


@dataclass(frozen=True)
class Advice:
    """A fix with its estimate.

    Attributes:
        fix: It.
        memory: After it, and in a combination after those before it too.
        fits: Whether that is enough.
    """

    fix: Fix
    memory: Memory
    fits: bool


def advise(plan: Plan, device: Device, shape_of: ShapeOf) -> tuple[list[Advice], list[Advice]]:
    """Each fix alone, by cost; and where none is enough, the shortest row of them in this order that is, or all."""
    alone = [_advice(fix, device, shape_of) for change in CHANGES if (fix := change(plan)) is not None]
    if any(advice.fits for advice in alone):
        return alone, []
    together: list[Advice] = []
    now = plan
    for change in CHANGES:
        if (fix := change(now)) is None:
            continue
        together.append(_advice(fix, device, shape_of))
        now = fix.plan
        if together[-1].fits:
            break
    return alone, together


def fits(estimate: Memory, device: Device) -> bool:
    """Whether a device has the memory."""
    return estimate.total <= device.memory


def _advice(fix: Fix, device: Device, shape_of: ShapeOf) -> Advice:
    found = memory(shape_of(fix.plan.vlm), fix.plan, device)
    return Advice(fix, found, fits(found, device))


def _chunked(plan: Plan) -> Fix | None:
    if plan.scoring.kernel != "whole":
        return None
    scoring = replace(plan.scoring, kernel="chunked")
    return Fix("--model.init_args.scoring.kernel chunked", "nothing", replace(plan, scoring=scoring))


def _micro_batch(plan: Plan) -> Fix | None:
    if plan.micro_batch == 1:
        return None
    if plan.rollout is not None:
        option = "--model.init_args.grpo.micro_batch_size 1"
        return Fix(option, "smaller products, same updates", replace(plan, micro_batch=1))
    accumulate = plan.accumulate * plan.batch_size
    option = f"--data.init_args.batch_size 1 --trainer.accumulate_grad_batches {accumulate}"
    changed = replace(plan, batch_size=1, micro_batch=1, accumulate=accumulate)
    return Fix(option, "smaller products, same updates", changed)


def _sampled_together(plan: Plan) -> Fix | None:
    if plan.rollout is None or not plan.rollout.in_process:
        return None
    together = plan.rollout.batch_size or plan.batch_size * plan.rollout.num_generations
    if together <= SAMPLED_TOGETHER:
        return None
    option = (
        "--model.init_args.rollout avar_lightning.rollout.HFRolloutEngine "
        f"--model.init_args.rollout.batch_size {SAMPLED_TOGETHER}"
    )
    cost = f"sampling takes up to {together / SAMPLED_TOGETHER:.0f} times as long"
    return Fix(option, cost, replace(plan, rollout=replace(plan.rollout, batch_size=SAMPLED_TOGETHER)))


def _checkpointing(plan: Plan) -> Fix | None:
    if plan.vlm.gradient_checkpointing:
        return None
    vlm = replace(plan.vlm, gradient_checkpointing=True)
    option = "--model.init_args.vlm.gradient_checkpointing true"
    return Fix(option, "every layer's forward is computed twice", replace(plan, vlm=vlm))


def _share_weights(plan: Plan) -> Fix | None:
    if plan.world_size == 1 or plan.shards == plan.world_size or plan.vlm.quantization is not None:
        return None
    option = "--trainer.strategy fsdp2"
    changed = replace(plan, strategy="fsdp2", shards=plan.world_size)
    return Fix(option, "weights travel between devices in every forward and backward", changed)


def _fewer_pixels(plan: Plan) -> Fix | None:
    if plan.max_pixels is None or plan.max_pixels // 2 < MIN_PIXELS:
        return None
    lengths, half = plan.lengths, plan.lengths.images // 2
    shorter = replace(
        lengths,
        longest=lengths.longest - half,
        images=lengths.images - half,
        mean=lengths.mean - lengths.mean_images / 2,
        mean_images=lengths.mean_images / 2,
    )
    changed = replace(plan, max_pixels=plan.max_pixels // 2, lengths=shorter)
    return Fix(f"--data.init_args.max_pixels {plan.max_pixels // 2}", "coarser pictures", changed)


def _adapters(plan: Plan) -> Fix | None:
    if plan.vlm.lora is not None:
        return None
    vlm = replace(plan.vlm, lora=LoRAConfig(), dtype="bfloat16")
    option = "--config configs/lora.yaml --model.init_args.vlm.dtype bfloat16"
    return Fix(option, "adapters learn instead of the weights", _without_reference(replace(plan, vlm=vlm)))


def _four_bits(plan: Plan) -> Fix | None:
    if plan.vlm.quantization is not None:
        return None
    vlm = replace(plan.vlm, lora=plan.vlm.lora or LoRAConfig(), dtype="bfloat16", quantization=QuantizationConfig())
    option, changed = "--config configs/qlora.yaml", replace(plan, vlm=vlm, precision="bf16-mixed")
    if plan.is_sharded:  # every process must hold 4-bit weights whole
        option += " --trainer.strategy ddp"
        changed = replace(changed, strategy="ddp", shards=1, offload=False)
    return Fix(option, "adapters learn, on weights rounded to 4 bits", _without_reference(changed))


def _offload(plan: Plan) -> Fix | None:
    if not plan.is_sharded or plan.offload:
        return None
    option = "--trainer.strategy fsdp2_cpu_offload"
    cost = "weights and updates go through host memory, several times as slow"
    return Fix(option, cost, replace(plan, strategy="fsdp2", shards=plan.world_size, offload=True))


def _without_reference(plan: Plan) -> Plan:
    """With adapters the reference is the model without them."""
    if plan.rollout is None:
        return plan
    return replace(plan, rollout=replace(plan.rollout, has_reference=False))


CHANGES: tuple[Callable[[Plan], Fix | None], ...] = (
    _chunked,
    _micro_batch,
    _sampled_together,
    _checkpointing,
    _share_weights,
    _fewer_pixels,
    _adapters,
    _offload,
    _four_bits,
)
"""By cost: what changes nothing, what takes time, what changes what is learned."""
