"""What a model is made of, as far as its memory and its work go by it: read from its modules, whatever its family.

Blocks are the layers that transformers can checkpoint: decoder layers, and those of a vision tower.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from avar_lightning.attention import find_vlm

Kind = Literal["language", "vision"]
SCALE_BITS = {True: 0.127, False: 0.5}
"""Bits a weight for the scales of 4-bit weights, with and without double quantisation (blocks of 64)."""


@dataclass
class Site:
    """A linear layer with whatever adapts it."""

    name: str
    fan_in: int
    fan_out: int
    trains: bool
    rank: int = 0
    adapter_bytes: int = 4
    dropout: bool = False


@dataclass
class Block:
    """One layer of the language model or of the vision tower."""

    kind: Kind
    index: int
    attention: list[Site] = field(default_factory=list)
    """Projections of queries, keys and values, and last the one of the output."""
    others: list[list[Site]] = field(default_factory=list)
    """Groups of linear layers side by side, the last one behind the others: the MLP."""
    norms: list[tuple[int, bool, bool]] = field(default_factory=list)
    """Width, whether it computes in float32 by itself (RMSNorm), and whether it trains."""
    width: int = 0
    """Heads × head dimension."""
    key_width: int = 0
    num_heads: int = 0
    head_dim: int = 0
    num_parameters: int = 0
    num_trained: int = 0

    @property
    def sites(self) -> list[Site]:
        """All linear layers, in order."""
        return self.attention + [site for group in self.others for site in group]


@dataclass
class Part:
    """Parameters of one part of the model."""

    total: int = 0
    trained: int = 0


@dataclass
class Shape:
    """What a model is made of.

    Attributes:
        parts: Parameters of `language`, `embeddings`, `head`, `vision` and `adapters`.
        weight_bytes: Of all weights as loaded, scales of 4-bit weights included.
        trained_bytes: Of those that train, in their dtype.
        cast_bytes: Those that autocast would copy to 2 bytes: matrices wider than that; (trained, frozen).
        blocks: Layers, from the image to the answer.
        projector: Linear layers of the vision side outside of its blocks: one row for each image token.
        patch_weights: Weights of the convolution that makes patches, and whether they train.
        unknown: Share of the language model's and vision tower's weights that lie in no module known here.
    """

    family: str
    parts: dict[str, Part]
    weight_bytes: float
    trained_bytes: float
    cast_bytes: tuple[float, float]
    blocks: list[Block]
    projector: list[Site]
    patch_weights: tuple[int, bool]
    head: Site
    hidden: int
    checkpointing: bool
    attention: str
    vision: VisionShape
    unknown: float

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return sum(part.total for part in self.parts.values())

    @property
    def num_trained(self) -> int:
        """Those that train."""
        return sum(part.trained for part in self.parts.values())

    def blocks_of(self, kind: Kind) -> list[Block]:
        """Layers of one tower."""
        return [block for block in self.blocks if block.kind == kind]


@dataclass(frozen=True)
class VisionShape:
    """How pictures become tokens."""

    patches_per_token: float
    tokens_per_image: int | None
    """Fixed by the architecture, or None where it follows the picture's size."""
    pixels_per_token: int
    window: int | None
    """Patches that a patch of a windowed layer sees; None where all see their whole picture."""
    full_layers: tuple[int, ...] | None


def shape_of(model: nn.Module) -> Shape:
    """Read the shape of a Hugging Face VLM, perhaps with adapters or 4-bit weights, on any device."""
    vlm: Any = find_vlm(model)
    decoder, head = vlm.get_decoder(), vlm.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()}
    embeddings = {id(parameter) for parameter in vlm.get_input_embeddings().parameters()}
    head_parameters = {id(parameter) for parameter in head.parameters()}
    in_decoder = {id(parameter) for parameter in decoder.parameters()}
    parts: dict[str, Part] = defaultdict(Part)
    weight_bytes = trained_bytes = 0.0
    casts = [0.0, 0.0]
    for name, parameter in vlm.named_parameters():
        count, size = _elements(parameter), float(parameter.numel() * parameter.element_size())
        size += count * SCALE_BITS[_double(parameter)] / 8 if _is_4bit(parameter) else 0
        if "lora_" in name:
            part = "adapters"
        elif id(parameter) in embeddings:
            part = "embeddings"
        elif id(parameter) in head_parameters:
            part = "head"
        else:
            part = "language" if id(parameter) in in_decoder else "vision"
        parts[part].total += count
        weight_bytes += size
        if parameter.requires_grad:
            parts[part].trained += count
            trained_bytes += size
        if parameter.ndim > 1 and parameter.element_size() == 4 and not _is_4bit(parameter) and part != "embeddings":
            casts[not parameter.requires_grad] += 2.0 * count
    layers = [(name, m) for name, m in vlm.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    numbers: dict[Kind, int] = defaultdict(int)
    blocks = []
    for _, module in layers:
        kind: Kind = "language" if id(module) in inside else "vision"
        block = _block(module, kind, numbers[kind])
        if block.attention or block.others:
            blocks.append(block)
            numbers[kind] += 1
    blocks.sort(key=lambda block: (block.kind == "language", block.index))
    in_blocks = {id(inner) for _, module in layers for inner in module.modules()}
    outside = {
        name: m for name, m in vlm.named_modules() if id(m) not in in_blocks and id(m) not in inside and m is not head
    }
    projector = _sites(outside)
    convolutions = [m for m in outside.values() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    patch = sum(m.weight.numel() for m in convolutions)
    known = sum(block_known(block) for block in blocks) + sum(s.fan_in * s.fan_out for s in projector) + patch
    expected = parts["language"].total + parts["vision"].total
    return Shape(
        family=type(vlm).__name__,
        parts=dict(parts),
        weight_bytes=weight_bytes,
        trained_bytes=trained_bytes,
        cast_bytes=(casts[0], casts[1]),
        blocks=blocks,
        projector=projector,
        patch_weights=(patch, any(m.weight.requires_grad for m in convolutions)),
        head=Site("head", head.in_features, head.out_features, head.weight.requires_grad),
        hidden=head.in_features,
        checkpointing=any(getattr(module, "gradient_checkpointing", False) for module in vlm.modules()),
        attention=decoder.config._attn_implementation,
        vision=_vision(vlm.config),
        unknown=max(0.0, 1 - known / max(expected, 1)),
    )


def block_known(block: Block) -> int:
    """Weights of a block's linear layers."""
    return sum(site.fan_in * site.fan_out for site in block.sites)


def _elements(parameter: Any) -> int:
    """Weights behind a parameter; two a byte where they are packed in 4 bits."""
    if _is_4bit(parameter):
        return int(parameter.numel() * parameter.element_size() * 2)
    return int(parameter.numel())


def _is_4bit(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit"


def _double(parameter: Any) -> bool:
    return bool(getattr(parameter, "compress_statistics", True))


def _block(module: nn.Module, kind: Kind, index: int) -> Block:
    block = Block(kind, index)
    block.num_parameters = sum(_elements(p) for p in module.parameters())
    block.num_trained = sum(_elements(p) for p in module.parameters() if p.requires_grad)
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in _sites(dict(module.named_modules())):
        groups[site.name.rpartition(".")[0]].append(site)
    for parent, sites in groups.items():
        owner: Any = module.get_submodule(parent)
        if "attn" in parent.lower() or "attention" in type(owner).__name__.lower():
            block.attention = sites
            block.width = sites[-1].fan_in
            made = sum(site.fan_out for site in sites[:-1])
            block.key_width = max(0, made - block.width) // 2
            block.head_dim = int(getattr(owner, "head_dim", 0) or block.width // int(getattr(owner, "num_heads", 1)))
            block.num_heads = block.width // max(block.head_dim, 1)
        else:
            block.others.append(sites)
    for inner in module.modules():
        weight = getattr(inner, "weight", None)
        if "norm" in type(inner).__name__.lower() and weight is not None:
            width = weight.numel()
            if width == block.head_dim and width < block.width:
                queries = not any(w == block.width and r for w, r, _ in block.norms[-1:])
                width = block.width if queries else block.key_width
            block.norms.append((width, not isinstance(inner, nn.LayerNorm), bool(weight.requires_grad)))
    return block


def _sites(modules: dict[str, nn.Module]) -> list[Site]:
    """Linear layers by name; adapters belong to the layer that they adapt."""
    found: dict[str, Site] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        owner, mark, _ = name.partition(".lora_")
        owner = owner.removesuffix(".base_layer")
        weight: Any = module.weight
        if not mark:
            found[owner] = Site(owner, module.in_features, module.out_features, weight.requires_grad)
        elif name.startswith(f"{owner}.lora_A"):
            found[owner].rank += module.out_features
            found[owner].adapter_bytes = weight.element_size()
            dropout: Any = getattr(modules.get(owner), "lora_dropout", {})
            found[owner].dropout = any(isinstance(inner, nn.Dropout) and inner.p > 0 for inner in dropout.values())
    return list(found.values())


def _vision(config: Any) -> VisionShape:
    own: Any = getattr(config, "vision_config", None)
    patch = _edge(getattr(own, "patch_size", 14))
    merge = int(getattr(own, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None) or 1)
    ratio = getattr(config, "downsample_ratio", None)
    per_token = merge**2 if ratio is None else round(1 / ratio**2)
    per_token = int(getattr(config, "scale_factor", 0) or 0) ** 2 or per_token
    size = getattr(own, "image_size", None)
    fixed = None
    if size is not None and not hasattr(own, "spatial_merge_size"):
        patches = (_edge(size) // patch) ** 2
        fixed = int(getattr(config, "mm_tokens_per_image", None) or patches // per_token)
        per_token = patches / fixed
    window = getattr(own, "window_size", None)
    full = getattr(own, "fullatt_block_indexes", None)
    return VisionShape(
        per_token,
        fixed,
        int(patch**2 * per_token),
        (window // patch) ** 2 if window and full is not None else None,
        tuple(full) if full is not None else None,
    )


def _edge(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)
