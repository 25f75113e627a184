"""Work of one update and the time that it takes: floating point operations over what a device does in a second.

A product of (n, k) and (k, m) is 2·n·k·m operations. Every linear layer is counted by its own size, forward, for its
input's gradient and for its weight's, and again where checkpointing computes it twice; attention by its two products
forward and four (fused kernels five: they compute the probabilities again) backward over all pairs of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from avar_lightning.doctor.activations import NUM_KEY_GROUPS, Rows, in_graph, needs_input_gradient
from avar_lightning.doctor.hardware import Device
from avar_lightning.doctor.memory import scored_rows
from avar_lightning.doctor.plan import Plan
from avar_lightning.doctor.shape import Block, Shape, Site

BANDWIDTH_SHARE = 0.6
"""Of the maker's memory bandwidth, in decoding."""


@dataclass(frozen=True)
class Work:
    """Floating point operations of one process in one update.

    Attributes:
        forward: Of layers and head, recomputation not included.
        backward: The same.
        recompute: Forwards that are done a second time.
        guidance: Of recorded attention.
        rollout: Of sampling and of passes without gradients.
    """

    forward: float
    backward: float
    recompute: float
    guidance: float
    rollout: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.recompute + self.guidance + self.rollout


@dataclass(frozen=True)
class Timing:
    """Seconds of one update, and of the run where its length is known.

    Attributes:
        work: Operations of one process.
        compute: Seconds of products in the computation's dtype.
        guidance: Seconds of recorded attention, whose products are float32 but for bfloat16 on a GPU.
        decoding: Seconds of sampling, one token after the other.
        peak: Operations a second that the device could do.
        utilisation: Share of them that is assumed.
        tokens: That one update learns from, over all processes.
        updates: Of the run; None where unknown.
        exchanged: Bytes that each process sends and receives for one update.
    """

    work: Work
    compute: float
    guidance: float
    decoding: float
    peak: float
    utilisation: float
    tokens: float
    updates: float | None
    exchanged: float

    @property
    def step(self) -> float:
        """Seconds of one update."""
        return self.compute + self.guidance + self.decoding

    @property
    def hours(self) -> float | None:
        """Of the run."""
        return None if self.updates is None else self.updates * self.step / 3600


def timing(shape: Shape, plan: Plan, device: Device, utilisation: float) -> Timing:
    """Estimate the time of a plan on one kind of device."""
    mean = _of_mean_length(shape, plan)
    batches = plan.accumulate if plan.rollout is None else _micro_batches(plan)
    work = work_of(shape, plan, mean)
    work = Work(*(batches * value for value in vars(work).values()))
    decoding = 0.0
    if plan.rollout is not None:
        work = replace(work, rollout=_passes(shape, plan, mean, batches))
        decoding = _decoding(shape, plan, device) / _updates_per_batch(plan)
    narrow = plan.compute_bytes == 2 and device.bf16 is not None
    peak = device.bf16 if narrow and device.bf16 else device.fp32
    dense = work.total - work.guidance
    in_float32 = device.is_cpu or plan.is_float16
    length = plan.lengths.mean + (plan.rollout.new_tokens if plan.rollout else 0)
    return Timing(
        work,
        dense / (peak * utilisation),
        work.guidance / ((device.fp32 if in_float32 else peak) * utilisation),
        decoding,
        peak,
        utilisation,
        plan.sequences_per_step * length,
        updates_of(plan),
        _exchanged(shape, plan, batches),
    )


def updates_of(plan: Plan) -> float | None:
    """Updates of the run: by steps, or by epochs where the number of samples is known."""
    found = [float(plan.max_steps)] if plan.max_steps > 0 else []
    if plan.num_samples is not None and plan.max_epochs not in (None, -1):
        # Lightning makes one update of what is left at an epoch's end.
        batches = plan.num_samples // (plan.batch_size * plan.world_size)
        assert plan.max_epochs is not None
        found.append(plan.max_epochs * -(-batches // plan.accumulate) * _updates_per_batch(plan))
    return min(found) if found else None


def work_of(shape: Shape, plan: Plan, rows: Rows) -> Work:
    """Operations of one forward and backward over a micro-batch of the given sizes."""
    forward = backward = recompute = guidance = 0.0
    eager = shape.attention == "eager"
    for block, on_graph, below in zip(shape.blocks, in_graph(shape), needs_input_gradient(shape), strict=True):
        count, keys = rows.rows_of(block), rows.keys_of(block, shape)
        linear = count * sum(_forward(site) for site in block.sites)
        pairs = 2.0 * count * keys * block.width
        forward += linear + 2 * pairs
        if on_graph:
            backward += count * _backward(block, below) + (4 if eager else 5) * pairs
            if shape.checkpointing:
                recompute += linear + 2 * pairs - count * _skipped(block)
        if block.kind == "language" and plan.guidance and block.index in (plan.guidance.layers or (block.index,)):
            recorded = 2.0 * rows.sequences * rows.guided * rows.recorded_keys
            narrow = recorded * block.num_heads * NUM_KEY_GROUPS
            forwards = 2 if shape.checkpointing else 1
            guidance += forwards * (recorded * block.width + narrow) + 3 * recorded * block.width + narrow
    patch, trains = shape.patch_weights
    forward += 2.0 * patch * rows.patches + 2.0 * rows.image_tokens * sum(s.fan_in * s.fan_out for s in shape.projector)
    on_image_side = trains or any(b.num_trained for b in shape.blocks_of("vision"))
    backward += 2.0 * patch * rows.patches * trains
    backward += rows.image_tokens * sum(
        2.0 * s.fan_in * s.fan_out * (s.trains + (on_image_side or s.trains)) for s in shape.projector
    )
    head, scored = shape.head, scored_rows(plan, rows)
    if plan.scoring.kernel == "whole" and plan.rollout is None:
        scored = rows.sequences * rows.length
    forward += scored * _forward(head)
    backward += scored * 2.0 * head.fan_in * head.fan_out * (1 + head.trains)
    recompute += 0 if plan.scoring.kernel == "whole" else scored * _forward(head)
    return Work(forward, backward, recompute, guidance, 0.0)


def _forward(site: Site) -> float:
    """Operations a row."""
    return 2.0 * (site.fan_in * site.fan_out + site.rank * (site.fan_in + site.fan_out))


def _backward(block: Block, below: bool) -> float:
    """Operations a row; the first layer that trains need not know the gradient of what it was given."""
    total = 0.0
    for site in block.sites:
        to_input = below or site not in block.attention[:-1]
        plain, adapters = 2.0 * site.fan_in * site.fan_out, 2.0 * site.rank * (site.fan_in + site.fan_out)
        total += plain * (to_input + site.trains) + adapters
        total += 2.0 * site.rank * (site.fan_out + site.fan_in * to_input)
    return total


def _skipped(block: Block) -> float:
    """What a checkpoint does not compute again: its last product, once everything that backward needs is there."""
    last = block.sites[-1]
    if last.rank:
        return 2.0 * last.rank * last.fan_out
    return _forward(last)


def _of_mean_length(shape: Shape, plan: Plan) -> Rows:
    lengths = plan.lengths
    mean = replace(plan, lengths=replace(lengths, longest=round(lengths.mean), images=round(lengths.mean_images)))
    return Rows.of(mean, shape)


def _updates_per_batch(plan: Plan) -> int:
    return plan.rollout.num_epochs * plan.rollout.num_minibatches if plan.rollout else 1


def _micro_batches(plan: Plan) -> float:
    """Micro-batches of one update."""
    assert plan.rollout is not None
    return plan.batch_size * plan.rollout.num_generations / plan.rollout.num_minibatches / plan.micro_batch


def _passes(shape: Shape, plan: Plan, rows: Rows, batches: float) -> float:
    """Forwards without gradient over the completions of one update: old log-probabilities and attention, reference."""
    assert plan.rollout is not None
    one = work_of(shape, replace(plan, guidance=None), rows).forward * batches / plan.rollout.num_epochs
    return one * (plan.rollout.scores_all + plan.rollout.kl)


def _decoding(shape: Shape, plan: Plan, device: Device) -> float:
    """Seconds to sample the completions of a batch of prompts in this process; servers elsewhere are not estimated."""
    rollout = plan.rollout
    assert rollout is not None
    if not rollout.in_process:
        return 0.0
    together = rollout.batch_size or plan.batch_size * rollout.num_generations
    times = plan.batch_size * rollout.num_generations / together
    weights = shape.num_parameters * plan.compute_bytes
    cache = sum(2 * block.key_width for block in shape.blocks_of("language")) * plan.compute_bytes
    read = weights + together * cache * (plan.lengths.mean + rollout.new_tokens / 2)
    language = sum(_forward(site) for block in shape.blocks_of("language") for site in block.sites)
    peak = device.bf16 if plan.compute_bytes == 2 and device.bf16 else device.fp32
    token = max(read / (device.bandwidth * BANDWIDTH_SHARE), together * language / peak)
    return times * rollout.new_tokens * token


def _exchanged(shape: Shape, plan: Plan, batches: float) -> float:
    """Bytes that one process receives in an update."""
    if plan.world_size == 1:
        return 0.0
    if not plan.is_sharded or plan.shards == 1:
        return 2.0 * shape.trained_bytes
    weights = shape.num_parameters * (plan.compute_bytes if plan.is_mixed else 4)
    gradients = shape.trained_bytes
    return batches * ((2 if plan.reshard else 1) * weights + gradients)
