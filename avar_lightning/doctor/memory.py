"""Memory that a plan needs: on each device at its fullest moment, on each node, and on disk."""

from __future__ import annotations

from dataclasses import dataclass

from avar_lightning.doctor.activations import Bytes, Rows, block_bytes, guidance_bytes, in_graph
from avar_lightning.doctor.hardware import GIB, Device
from avar_lightning.doctor.plan import Plan
from avar_lightning.doctor.shape import Shape

MARGIN = 0.08
"""Share of the peak that an allocator loses to fragments."""
CUDA_CONTEXT = 0.6 * GIB
"""What CUDA and its libraries take of a device beside tensors, NCCL's buffers not counted."""
NCCL_BUFFERS = 0.8 * GIB
PROCESS = {"cpu": 0.9 * GIB, "cuda": 3.0 * GIB}
"""Host memory of one process with its imports."""
WORKER = 0.6 * GIB
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
"""Of attention_mass; three of them exist at a time."""


@dataclass(frozen=True)
class Memory:
    """An estimate.

    Attributes:
        always: Bytes by name that a device holds all the time.
        moments: Bytes by name that come on top, by moment.
        extra: Bytes beside tensors.
        margin: For fragmentation.
        host: Bytes of host memory a node, by name.
        checkpoint: Bytes of one checkpoint on disk.
        disk: Bytes of all that are there at a time.
    """

    always: dict[str, float]
    moments: dict[str, dict[str, float]]
    extra: float
    margin: float
    host: dict[str, float]
    checkpoint: float
    disk: float

    @property
    def fullest(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def tensors(self) -> float:
        """Bytes of tensors at the peak."""
        return sum(self.always.values()) + sum(self.moments[self.fullest].values())

    @property
    def total(self) -> float:
        """What a device must have."""
        return self.tensors + self.extra + self.margin


def memory(shape: Shape, plan: Plan, device: Device) -> Memory:
    """Estimate the memory of a plan on one kind of device."""
    always = _always(shape, plan)
    moments = _moments(shape, plan, device)
    kind = "cpu" if device.is_cpu else "cuda"
    peak = sum(always.values()) + max(sum(moment.values()) for moment in moments.values())
    extra = 0.0 if device.is_cpu else CUDA_CONTEXT + (NCCL_BUFFERS if plan.world_size > 1 else 0)
    if device.is_cpu:
        extra = PROCESS["cpu"] + plan.num_workers * WORKER
    # Over 4-bit weights only adapters are kept.
    kept = shape.trained_bytes if plan.vlm.quantization else shape.weight_bytes
    checkpoint = kept + 2 * shape.trained_bytes
    return Memory(
        always,
        moments,
        extra,
        MARGIN * peak,
        _host(shape, plan, kind),
        checkpoint,
        checkpoint * plan.kept_checkpoints + (shape.trained_bytes if plan.vlm.lora else shape.weight_bytes),
    )


def _always(shape: Shape, plan: Plan) -> dict[str, float]:
    factor = 0.5 if plan.precision.endswith("16-true") and plan.vlm.dtype == "float32" else 1.0
    held = 0.0 if plan.offload else 1.0 / plan.shards
    found = {
        "weights": factor * shape.weight_bytes * held,
        "optimiser states": 2 * factor * shape.trained_bytes * held,
    }
    if plan.rollout and plan.rollout.has_reference:
        found["reference model"] = factor * shape.weight_bytes * held
    return found


def gradient_bytes(shape: Shape, plan: Plan) -> float:
    """All gradients of one process."""
    factor = 0.5 if plan.precision.endswith("16-true") and plan.vlm.dtype == "float32" else 1.0
    return factor * shape.trained_bytes / plan.shards if not plan.offload else 0.0


def _moments(shape: Shape, plan: Plan, device: Device) -> dict[str, dict[str, float]]:
    """What comes on top of what is always there, where the peak may be."""
    size, gradients = Bytes.of(plan), gradient_bytes(shape, plan)
    shared = _shared(shape, plan, size)
    if plan.strategy == "ddp":  # buckets hold every gradient a second time
        shared["gradient buckets"] = gradients
    moments = {
        **{name: parts | shared for name, parts in _learning(shape, plan, size, gradients, device).items()},
        # PyTorch's AdamW takes all parameters at once on accelerators, with one more copy for its denominators.
        "in the optimiser's step": {"gradients": gradients, "copies of AdamW": 0.0 if device.is_cpu else gradients},
    }
    if plan.rollout and plan.rollout.in_process:
        moments["while completions are sampled"] = _sampling(shape, plan, size)
    return {name: {item: value for item, value in parts.items() if value} for name, parts in moments.items()}


def _learning(shape: Shape, plan: Plan, size: Bytes, gradients: float, device: Device) -> dict[str, dict[str, float]]:
    """Where a forward's activations are all there and no gradient is, and where it is the other way round."""
    rows = Rows.of(plan, shape)
    kept, largest = _kept(shape, plan, size, rows)
    logits, blocks = logit_bytes(shape, plan, rows), _mass_blocks(shape, plan, rows, device)
    head = float(shape.head.fan_in * shape.head.fan_out * shape.head.trains)
    is_shared = plan.is_sharded and plan.shards > 1
    whole_head = head * (size.compute if is_shared and plan.is_mixed else size.weights)
    several = plan.accumulate > 1 or (plan.rollout is not None and _micro_batches(plan) > 1)
    # Logits are there when no layer works, and a layer works when no logits are there.
    layer = largest if shape.checkpointing else 0.0
    turn = {
        "activations": sum(kept),
        "logits": logits,
        "a layer at work, where that is more": max(0.0, layer + blocks - logits),
        "gradients": gradients if several else min(gradients, head * size.weights / plan.shards),
        "weights in low precision": _casts(shape, plan),
    }
    # The second gradient of tied embeddings is made once every layer is done.
    tied = 0.0 if "head" in shape.parts else whole_head
    work = (layer or max(kept, default=0.0)) + blocks + largest / 2
    end = {
        "gradients": gradients,
        "one layer and its gradients": work,
        "gradient of tied embeddings, where that is more": max(0.0, tied - work),
    }
    if is_shared:
        turn["gradient of the head before it is shared"] = whole_head
        outside = _outside(shape, trained=True) * _reduced(plan, size)
        end["gradients of what is no layer before they are shared"] = float(outside)
    if plan.scoring.kernel != "whole" and scored_rows(plan, rows) > plan.scoring.chunk_size:
        turn["gradient of the head, once more"] = whole_head
    return {"between forward and backward": turn, "at the end of the backward": end}


def _mass_blocks(shape: Shape, plan: Plan, rows: Rows, device: Device) -> float:
    """Three blocks of probabilities, which recorded attention works through: all at once where they are few."""
    if plan.guidance is None:
        return 0.0
    heads = max((block.num_heads for block in shape.blocks_of("language")), default=0)
    everything = 4.0 * rows.sequences * heads * rows.guided * rows.recorded_keys
    return 3.0 * min(everything, BLOCK_BYTES["cpu" if device.is_cpu else "cuda"])


def _kept(shape: Shape, plan: Plan, size: Bytes, rows: Rows) -> tuple[list[float], float]:
    """What each layer keeps until its backward, and the most that one keeps without checkpointing."""
    kept, largest = [], 0.0
    for block, on_graph in zip(shape.blocks, in_graph(shape), strict=True):
        count, keys = rows.rows_of(block), rows.keys_of(block, shape)
        whole = block_bytes(block, count, keys, shape.attention, size, padded=plan.micro_batch > 1)
        guided = guidance_bytes(block, rows, size) if _is_guided(plan, block.kind, block.index) else 0.0
        largest = max(largest, whole + guided)
        width = max((site.fan_in for site in block.attention[:1]), default=shape.hidden)
        if on_graph:
            # Of recorded attention a checkpoint keeps the masses, which the loss needs, and not the queries.
            kept.append(size.residual * count * width + guided / 2 if shape.checkpointing else whole + guided)
    return kept, largest


def _is_guided(plan: Plan, kind: str, index: int) -> bool:
    if plan.guidance is None or kind != "language":
        return False
    return plan.guidance.layers is None or index in plan.guidance.layers


def _micro_batches(plan: Plan) -> float:
    assert plan.rollout is not None
    return plan.batch_size * plan.rollout.num_generations / plan.rollout.num_minibatches / plan.micro_batch


def logit_bytes(shape: Shape, plan: Plan, rows: Rows) -> float:
    """Logits at their fullest: in float32 and once more as their gradient is made.

    Where products are narrower, both in their dtype too; divided by a temperature, once more. Whole logits are copied
    as the scored ones are taken out, and so is their gradient.
    """
    words, scored = shape.head.fan_out, scored_rows(plan, rows)
    each = 8.0 + (4.0 if plan.compute_bytes < 4 else 0.0) + (4.0 if plan.rollout else 0.0)
    if plan.scoring.kernel != "whole":
        return min(scored, plan.scoring.chunk_size) * words * each
    return rows.sequences * rows.length * words * (each + 8.0)


def scored_rows(plan: Plan, rows: Rows) -> int:
    """Positions of a micro-batch whose tokens are scored."""
    if plan.rollout is not None:
        return rows.sequences * plan.rollout.new_tokens
    return round(rows.sequences * rows.length * plan.lengths.responses)


def _casts(shape: Shape, plan: Plan) -> float:
    """Copies of float32 weights that autocast makes; FSDP does it as it gathers."""
    if not plan.is_mixed or plan.is_sharded:
        return 0.0
    trained, frozen = shape.cast_bytes
    # A frozen weight's copy lives as long as the layer's graph: one layer at a time under checkpointing.
    return trained + (0.0 if shape.checkpointing else frozen)


def _shared(shape: Shape, plan: Plan, size: Bytes) -> dict[str, float]:
    """What sharding takes beside the shard: whole weights of two layers and of all that is no layer."""
    if not plan.is_sharded or plan.shards == 1:
        return {}
    wide = size.compute if plan.is_mixed else size.weights
    unit = max((block.num_parameters for block in shape.blocks), default=0)
    trained = max((block.num_trained for block in shape.blocks), default=0)
    rest, reduced = _outside(shape, trained=False), _reduced(plan, size)
    found = {
        "gathered: what is no layer": float(rest * wide),
        "gathered: two layers": 2.0 * unit * wide,
        "gradients of a layer before they are shared": float(trained * reduced * 2),
    }
    if not plan.reshard:
        found["gathered: all layers"] = float((shape.num_parameters - rest) * wide)
    return found


def _outside(shape: Shape, *, trained: bool) -> int:
    """Parameters of no layer, which make one unit: embeddings, head, what joins pictures and text."""
    if trained:
        return shape.num_trained - sum(block.num_trained for block in shape.blocks)
    return shape.num_parameters - sum(block.num_parameters for block in shape.blocks)


def _reduced(plan: Plan, size: Bytes) -> int:
    """Bytes of a gradient's number as processes add it up."""
    if not plan.is_mixed:
        return size.weights
    return 4 if plan.strategy == "fsdp2" else size.compute


def _sampling(shape: Shape, plan: Plan, size: Bytes) -> dict[str, float]:
    assert plan.rollout is not None
    together = plan.rollout.batch_size or plan.batch_size * plan.rollout.num_generations
    cache = sum(2 * block.key_width for block in shape.blocks_of("language"))
    found = {
        "key-value cache": float(together * plan.sequence * cache * size.compute),
        "logits of one token": together * shape.head.fan_out * 12.0,
        "prefill of one layer": together * plan.lengths.longest * shape.hidden * 8.0 * size.compute,
        "weights in low precision": _casts(shape, plan),
    }
    if plan.is_sharded and plan.shards > 1:
        found["gathered: the whole model"] = float(shape.num_parameters * (size.compute if plan.is_mixed else 4))
    return found


def _host(shape: Shape, plan: Plan, kind: str) -> dict[str, float]:
    """Of one node, while the model is loaded."""
    found = {"processes": plan.devices * PROCESS[kind], "data workers": plan.devices * plan.num_workers * WORKER}
    copies = 1 if plan.is_sharded else plan.devices
    if kind == "cuda" or plan.is_sharded:
        found["weights while loading"] = copies * shape.weight_bytes
    if plan.offload:
        share = plan.devices / plan.shards
        found["offloaded weights, gradients, states"] = share * (shape.weight_bytes + 3 * shape.trained_bytes)
        if plan.rollout and plan.rollout.has_reference:
            found["offloaded reference model"] = share * shape.weight_bytes
    return found
