"""Visual Attention Score: how much a query looks at the image, in units of its look at the system prompt.

VAS_i(l, h) = m_V(i) / m_S(i), the masses of image and system keys for query i in layer l, head h (AVAR, arXiv
2603.03825). The ratio has a heavy tail: heads that hardly look at the system prompt decide the mean. So the
paper's reduction has robust ones beside it.

Shape letters: L layers, B samples, H heads, N query rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

REDUCTIONS = ("mean_of_ratios", "ratio_of_means", "share", "median")
"""How ratios of a sample's layers, heads and queries become one number; see `visual_attention_score`."""

MIN_MASS = 1e-12
"""A smaller system mass counts as this one, so that a head which ignores the system prompt stays finite."""


def visual_attention_score(
    mass_image: Tensor, mass_system: Tensor, query_mask: Tensor, *, reduction: str = "mean_of_ratios"
) -> Tensor:
    """Visual Attention Score of each sample.

    With v, s the masses of image and system, and means over layers, heads and the sample's queries:

    - `mean_of_ratios`: mean(v / s), the paper's.
    - `ratio_of_means`: mean(v) / mean(s).
    - `share`: mean over layers and heads of v̄ / (v̄ + s̄), v̄ and s̄ the means over queries; in [0, 1].
    - `median`: median(v / s), of an even number the mean of the middle two.

    Args:
        mass_image: Masses on the image tokens (L, B, H, N).
        mass_system: Masses on the system tokens (L, B, H, N).
        query_mask: The queries, bool (B, N).
        reduction: One of `REDUCTIONS`.

    Returns:
        (B,), float. NaN where a sample has no query, no image mass at all or no system mass at all.

    Raises:
        ValueError: Shapes differ, or the reduction is unknown.

    >>> image, system = torch.tensor([0.6, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.0])
    >>> queries = torch.tensor([[True, True, False]])
    >>> visual_attention_score(image.view(1, 1, 1, 3), system.view(1, 1, 1, 3), queries)
    tensor([3.5000])
    """
    _check(mass_image, mass_system, query_mask, reduction)
    return _reduce(mass_image, mass_system, query_mask, reduction, per_head=False)


def vas_map(
    mass_image: Tensor, mass_system: Tensor, query_mask: Tensor, *, reduction: str = "mean_of_ratios"
) -> Tensor:
    """Visual Attention Score of each layer and head: reduced over queries alone, then the mean over samples.

    Args:
        mass_image: Masses on the image tokens (L, B, H, N).
        mass_system: Masses on the system tokens (L, B, H, N).
        query_mask: The queries, bool (B, N).
        reduction: One of `REDUCTIONS`.

    Returns:
        (L, H), float; samples whose score is undefined are left out, NaN where that leaves none.

    Raises:
        ValueError: Shapes differ, or the reduction is unknown.

    >>> image, system = torch.tensor([0.6, 0.2]).view(1, 1, 2, 1), torch.tensor([0.1, 0.2]).view(1, 1, 2, 1)
    >>> vas_map(image, system, torch.tensor([[True]]))
    tensor([[6., 1.]])
    """
    _check(mass_image, mass_system, query_mask, reduction)
    score_LBH = _reduce(mass_image, mass_system, query_mask, reduction, per_head=True)
    return score_LBH.nanmean(dim=1)


class VisualAttentionScore(Metric):
    """Mean Visual Attention Score over samples; right under DDP and FSDP, since sum and count are its states.

    The reduction applies within a sample, the mean over samples follows; with `median` that is the mean of
    the samples' medians. Samples whose score is undefined are not counted.

    Args:
        reduction: One of `REDUCTIONS`.
        **kwargs: For `torchmetrics.Metric`.

    Raises:
        ValueError: The reduction is unknown.

    >>> metric = VisualAttentionScore()
    >>> image, system = torch.full((2, 1, 4, 3), 0.6), torch.full((2, 1, 4, 3), 0.2)
    >>> metric.update(image, system, query_mask=torch.tensor([[True, True, False]]))
    >>> metric.compute()
    tensor(3.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, reduction: str = "mean_of_ratios", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_reduction(reduction)
        self.reduction = reduction
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mass_image: Tensor, mass_system: Tensor, query_mask: Tensor) -> None:
        """Add a batch; arguments as for `visual_attention_score`."""
        scores = visual_attention_score(mass_image.detach(), mass_system.detach(), query_mask, reduction=self.reduction)
        defined = ~scores.isnan()
        self.total += scores[defined].sum()
        self.count += defined.sum()

    def compute(self) -> Tensor:
        """Mean over samples; NaN when no sample had a score."""
        return self.total / self.count


def _reduce(mass_image: Tensor, mass_system: Tensor, query_mask: Tensor, reduction: str, *, per_head: bool) -> Tensor:
    """Reduce masses (L, B, H, N) over queries, and over layers and heads unless `per_head`; NaN if undefined.

    Returns:
        (B,), or (L, B, H) per head.
    """
    queries = query_mask[None, :, None, :].expand_as(mass_image)
    image, system = mass_image.where(queries, 0.0), mass_system.where(queries, 0.0)
    # Whether a score exists is a property of the sample, not of a head.
    defined = (image.sum((0, 2, 3)) > 0) & (system.sum((0, 2, 3)) > 0)
    dims = (3,) if per_head else (0, 2, 3)
    if reduction == "mean_of_ratios":
        score = (image / system.clamp(min=MIN_MASS)).sum(dims) / queries.sum(dims)
    elif reduction == "ratio_of_means":
        score = image.sum(dims) / system.sum(dims).clamp(min=MIN_MASS)
    elif reduction == "share":
        image_LBH, system_LBH = image.sum(3), system.sum(3)
        share_LBH = image_LBH / (image_LBH + system_LBH).clamp(min=MIN_MASS)
        score = share_LBH if per_head else share_LBH.mean((0, 2))
    else:
        ratio = (image / system.clamp(min=MIN_MASS)).unbind(1)
        rows = [ratio_LHN[..., mask] for ratio_LHN, mask in zip(ratio, query_mask, strict=True)]
        score = torch.stack([_median(row if per_head else row.flatten()) for row in rows], dim=1 if per_head else 0)
    return score.where(defined[None, :, None] if per_head else defined, torch.nan)


def _median(values: Tensor) -> Tensor:
    """Median over the last dimension, the mean of the middle two of an even number; NaN of nothing."""
    # Not nanquantile, which refuses inputs of more than 16 million values.
    count = values.shape[-1]
    if count == 0:
        return values.new_full(values.shape[:-1], torch.nan)
    low, high = (values.kthvalue(number).values for number in ((count + 1) // 2, count // 2 + 1))
    return (low + high) / 2


def _check(mass_image: Tensor, mass_system: Tensor, query_mask: Tensor, reduction: str) -> None:
    _check_reduction(reduction)
    check_masses(mass_image, mass_system, query_mask)


def check_masses(mass_image: Tensor, mass_system: Tensor, query_mask: Tensor) -> None:
    """Raise ValueError unless the masses are (L, B, H, N) and the query mask is their bool (B, N)."""
    if mass_image.dim() != 4 or mass_image.shape != mass_system.shape:
        raise ValueError(
            f"masses have shapes {tuple(mass_image.shape)} and {tuple(mass_system.shape)}, "
            "expected the same (layers, batch, heads, sequence), as `record.mass_of` returns."
        )
    expected = (mass_image.shape[1], mass_image.shape[3])
    if query_mask.shape != expected or query_mask.dtype != torch.bool:
        raise ValueError(f"query_mask is {query_mask.dtype} {tuple(query_mask.shape)}, expected bool {expected}.")


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}.")
