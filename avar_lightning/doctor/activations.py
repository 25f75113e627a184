"""What autograd keeps of a forward until the backward, by kind of operation.

Rows are tokens (patches) of a micro-batch, padding included. `c` bytes are those of a number in products, `r` those of
the residual stream: float32 under autocast over float32 weights, otherwise the dtype of the weights at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avar_lightning.doctor.plan import Plan
from avar_lightning.doctor.shape import Block, Shape, Site

NUM_KEY_GROUPS = 2  # image and system


@dataclass(frozen=True)
class Bytes:
    """Bytes of numbers in one forward: in products, in the residual stream, and of weights."""

    compute: int
    residual: int
    weights: int
    mixed: bool = False

    @staticmethod
    def of(plan: Plan) -> Bytes:
        """Of a plan: FSDP hands the layers weights of the computation's dtype, so the stream has it too."""
        weights = 2 if plan.precision.endswith("16-true") or plan.vlm.dtype != "float32" else 4
        sharded_mixed = plan.is_sharded and plan.is_mixed
        return Bytes(plan.compute_bytes, 2 if sharded_mixed else weights, weights, plan.is_mixed)


@dataclass(frozen=True)
class Rows:
    """Sizes of one micro-batch."""

    sequences: int
    length: int
    image_tokens: int
    patches: int
    guided: int
    """Rows of a sequence whose attention is recorded with a gradient."""
    recorded_keys: int
    """Keys of a sequence that these rows meet once more; at most, where only the keys of groups are needed."""

    @staticmethod
    def of(plan: Plan, shape: Shape) -> Rows:
        """The largest micro-batch of a plan."""
        lengths, guided, keys = plan.lengths, 0, plan.sequence
        if plan.guidance is not None:
            share = {"response": lengths.responses, "user": 1 - lengths.responses}
            guided = round(plan.sequence * min(1.0, sum(share[name] for name in plan.guidance.queries)))
        if shape.attention == "flex_attention" or (shape.attention == "sdpa" and not plan.is_float16):
            # Its kernels tell the log-sum-exp, so only groups are met; they stand before the response.
            keys = round(plan.sequence * (1 - lengths.responses))
        images = plan.micro_batch * lengths.images
        patches = round(images * shape.vision.patches_per_token)
        return Rows(plan.micro_batch, plan.sequence, images, patches, guided, keys)

    def rows_of(self, block: Block) -> int:
        """Rows that a block works on."""
        return self.sequences * self.length if block.kind == "language" else self.patches

    def keys_of(self, block: Block, shape: Shape) -> float:
        """Keys that one row of a block meets."""
        if block.kind == "language":
            return self.length
        whole = self.patches / max(self.sequences, 1)  # one picture a sequence
        window, full = shape.vision.window, shape.vision.full_layers
        return min(window, whole) if window and full is not None and block.index not in full else whole


def in_graph(shape: Shape) -> list[bool]:
    """Which blocks the backward goes through: those from the first on in which, or below which, anything trains."""
    below = {"vision": shape.patch_weights[1], "language": _embeds_with_gradient(shape)}
    answers = []
    for block in shape.blocks:
        below[block.kind] = below[block.kind] or block.num_trained > 0
        answers.append(below[block.kind])
    return answers


def needs_input_gradient(shape: Shape) -> list[bool]:
    """For each block, whether anything below it trains."""
    below = {"vision": shape.patch_weights[1], "language": _embeds_with_gradient(shape)}
    answers = []
    for block in shape.blocks:
        answers.append(below[block.kind])
        below[block.kind] = below[block.kind] or block.num_trained > 0
    return answers


def _embeds_with_gradient(shape: Shape) -> bool:
    return any(shape.parts[name].trained for name in ("embeddings", "vision") if name in shape.parts) or any(
        block.num_trained for block in shape.blocks if block.kind == "vision"
    )


def block_bytes(block: Block, rows: int, keys: float, attention: str, size: Bytes, *, padded: bool) -> float:
    """Bytes that one block's forward keeps for its backward.

    Args:
        block: It.
        rows: Tokens or patches.
        keys: That each of them meets.
        attention: Kernel of transformers.
        size: Bytes of numbers.
        padded: Whether sequences of a batch are of different length, so that SDPA is given a mask and repeated keys.
    """
    c, r = size.compute, size.residual
    total = 0.0
    for width, in_float32, trains in block.norms:
        # RMSNorm works on a float32 copy, which is its input itself where that is float32.
        total += 4 * width + (r * width if trains else 0) if in_float32 else r * width
    repeated = block.width if padded and attention in ("sdpa", "eager") else block.key_width
    total += c * (2 * block.width + 2 * repeated)
    if attention == "eager":
        total += block.num_heads * keys * (4 if c == 4 else 4 + 2 * c)
    else:
        total += 4 * block.num_heads
    groups = [block.attention, *block.others] if block.attention else block.others
    for group in groups:
        total += _input_bytes(group, size)
    for group in block.others:
        total += c * _mlp_width(group)
    return rows * total


def guidance_bytes(block: Block, rows: Rows, size: Bytes) -> float:
    """Bytes that the recorded attention of one layer keeps: its queries, their sums, and masses of every row."""
    queries = rows.sequences * rows.guided
    kept = queries * (size.compute * block.width + 4 * block.num_heads * (1 + NUM_KEY_GROUPS))
    everywhere = rows.sequences * rows.length * block.num_heads * 4
    # Masses by group, each stacked over layers, and products with masks in the loss.
    return kept + everywhere * (3 * NUM_KEY_GROUPS + 2)


def _input_bytes(group: Sequence[Site], size: Bytes) -> float:
    """Inputs of linear layers, which their weights' gradients need; those side by side share one."""
    *first, last = group
    # Autocast copies a wider input for each layer anew.
    copied = size.mixed and size.residual > size.compute
    total = 0.0
    for sites, fan_in in ((first, first[0].fan_in if first else 0), ([last], last.fan_in)):
        trained = sum(site.trains for site in sites)
        total += size.compute * fan_in * (trained if copied else min(trained, 1))
        adapted = [site for site in sites if site.rank]
        if adapted:
            # An adapter casts its input to its own dtype, and under autocast it is cast again to that of products.
            own = size.compute if size.mixed else adapted[0].adapter_bytes
            shared = not size.mixed and own == size.residual and not any(site.dropout for site in adapted)
            total += own * fan_in * (1 if shared else len(adapted))
            total += sum(fan_in for site in adapted if site.dropout)
            total += sum(own * site.rank for site in adapted)
    return total


def _mlp_width(group: Sequence[Site]) -> int:
    """Numbers between the linear layers of an MLP: before the nonlinearity, behind it, and what it is multiplied by."""
    made, inner = sum(site.fan_out for site in group[:-1]), group[-1].fan_in
    return made + inner if made >= 2 * inner else made
