"""Objectives on attention masses; masses are float32, whatever the model's dtype.

Shape letters: L layers, B samples, H heads, N query rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from avar_lightning.vas import check_masses


def attention_guidance_loss(
    mass_image: Tensor,
    mass_system: Tensor,
    query_mask: Tensor,
    num_image: Tensor,
    num_system: Tensor,
    *,
    eps: float = 1e-6,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The published objective: attend to the image, ignore the system prompt (AVAR's AGTO, arXiv 2603.03825).

    With a_K(l, h) the mean weight over the sample's queries and the keys K, that is the mean mass divided by
    |K|:

        enhance  = − mean over layers and heads of log(a_image + eps)
        suppress = + mean over layers and heads of log(a_system + eps)

    each then averaged over the samples that have queries and the keys in question. Neither has a floor that a
    model reaches: suppress falls until log(eps). `attention_share_loss` is the bounded form.

    Args:
        mass_image: Masses on the image tokens (L, B, H, N).
        mass_system: Masses on the system tokens (L, B, H, N).
        query_mask: The queries, bool (B, N).
        num_image: Image tokens of each sample (B,).
        num_system: System tokens of each sample (B,).
        eps: Added inside the logarithm.
        over_processes: Gives the mean of a count over the processes that average their gradients, a collective call.
            The mean over samples is then that over the samples of all of them, once it is averaged too.

    Returns:
        enhance and suppress, scalars. Exactly 0, with a gradient of 0, when no sample qualifies.

    Raises:
        ValueError: Shapes differ.

    >>> import torch
    >>> image, system = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), 0.2)
    >>> queries, four, two = torch.tensor([[True, True]]), torch.tensor([4]), torch.tensor([2])
    >>> attention_guidance_loss(image, system, queries, four, two, eps=0.0)  # -log(0.5 / 4), log(0.2 / 2)
    (tensor(2.0794), tensor(-2.3026))
    """
    check_masses(mass_image, mass_system, query_mask)
    for name, counts in (("num_image", num_image), ("num_system", num_system)):
        if counts.shape != query_mask.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(counts.shape)}, expected ({query_mask.shape[0]},), one a sample."
            )
    has_queries = query_mask.any(1)

    def mean_log(mass: Tensor, num_keys: Tensor) -> Tensor:
        weight = query_mean(mass, query_mask) / num_keys.clamp(min=1)[:, None]
        return _sample_mean((weight + eps).log(), mass, has_queries & (num_keys > 0), over_processes)

    return -mean_log(mass_image, num_image), mean_log(mass_system, num_system)


def attention_share_loss(
    mass_image: Tensor,
    mass_system: Tensor,
    query_mask: Tensor,
    *,
    target: float | None = None,
    eps: float = 1e-6,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The bounded objective: the image's share of the attention that image and system prompt get.

    With m̄ the mean mass over the sample's queries, s(l, h) = (m̄_image + eps) / (m̄_image + m̄_system +
    eps):

        share (no target)   mean over layers and heads of −log s, at least 0
        hinge (a target)    mean over layers and heads of max(0, target − s)

    then averaged over the samples whose queries see both image and system tokens.

    Args:
        mass_image: Masses on the image tokens (L, B, H, N).
        mass_system: Masses on the system tokens (L, B, H, N).
        query_mask: The queries, bool (B, N).
        target: Share from which on a head is left alone, in (0, 1].
        eps: Keeps the logarithm of a head that ignores both finite.
        over_processes: As in `attention_guidance_loss`.

    Returns:
        Scalar. Exactly 0, with a gradient of 0, when no sample qualifies.

    Raises:
        ValueError: Shapes differ, or the target is not in (0, 1].

    >>> import torch
    >>> image, system = torch.full((1, 1, 1, 2), 0.3), torch.full((1, 1, 1, 2), 0.1)
    >>> attention_share_loss(image, system, torch.tensor([[True, True]]), target=0.8)
    tensor(0.0500)
    """
    check_masses(mass_image, mass_system, query_mask)
    if target is not None and not 0.0 < target <= 1.0:
        raise ValueError(f"target is {target}, expected a share in (0, 1], for example 0.8.")
    image_LBH, system_LBH = query_mean(mass_image, query_mask), query_mean(mass_system, query_mask)
    sees_both = (image_LBH > 0).any(2).any(0) & (system_LBH > 0).any(2).any(0)
    share_LBH = (image_LBH + eps) / (image_LBH + system_LBH + eps)
    loss_LBH = -share_LBH.log() if target is None else (target - share_LBH).relu()
    return _sample_mean(loss_LBH, mass_image, sees_both, over_processes)


def query_mean(mass: Tensor, query_mask: Tensor) -> Tensor:
    """Mean of masses (L, B, H, N) over each sample's queries: (L, B, H), 0 for a sample without queries."""
    total = mass.where(query_mask[None, :, None, :], 0.0).sum(3)
    return total / query_mask.sum(1).clamp(min=1)[:, None]


def _sample_mean(
    loss_LBH: Tensor, mass: Tensor, qualifies: Tensor, over_processes: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Mean over layers, heads and the samples that qualify; without any, a 0 with the graph of `mass`."""
    # A rank whose batch has no image must still take part in the backward of the others.
    per_sample = loss_LBH.mean((0, 2)).where(qualifies, 0.0)
    count = qualifies.sum().to(mass.dtype)
    if over_processes is not None:
        count = over_processes(count)
    return per_sample.sum() / count.where(count > 0, 1.0) + 0.0 * mass.sum()
