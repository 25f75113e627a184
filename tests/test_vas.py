"""Visual Attention Score: numbers worked by hand, and the metric over two processes."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avar_lightning.vas import REDUCTIONS, VisualAttentionScore, vas_map, visual_attention_score

# 1 layer, 2 samples, 2 heads, 3 rows. Sample 0 asks in rows 0 and 1, sample 1 in row 2.
IMAGE = torch.tensor([[[[0.6, 0.2, 0.9], [0.4, 0.1, 0.9]], [[0.0, 0.9, 0.5], [0.0, 0.9, 0.3]]]])
SYSTEM = torch.tensor([[[[0.1, 0.2, 0.1], [0.1, 0.4, 0.1]], [[0.5, 0.1, 0.25], [0.5, 0.1, 0.3]]]])
QUERIES = torch.tensor([[True, True, False], [False, False, True]])
BY_HAND = {
    # ratios of sample 0: 6, 1, 4, 0.25; of sample 1: 2, 1
    "mean_of_ratios": [11.25 / 4, 1.5],
    "ratio_of_means": [1.3 / 0.8, 0.8 / 0.55],
    "share": [(0.8 / 1.1 + 0.5 / 1.0) / 2, (0.5 / 0.75 + 0.5) / 2],
    "median": [2.5, 1.5],
}
BY_HAND_PER_HEAD = {
    "mean_of_ratios": [(3.5 + 2) / 2, (2.125 + 1) / 2],
    "ratio_of_means": [(0.8 / 0.3 + 2) / 2, (0.5 / 0.5 + 1) / 2],
    "share": [(0.8 / 1.1 + 0.5 / 0.75) / 2, (0.5 + 0.5) / 2],
    "median": [(3.5 + 2) / 2, (2.125 + 1) / 2],
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_by_hand(reduction: str) -> None:
    score = visual_attention_score(IMAGE, SYSTEM, QUERIES, reduction=reduction)
    torch.testing.assert_close(score, torch.tensor(BY_HAND[reduction]))
    per_head = vas_map(IMAGE, SYSTEM, QUERIES, reduction=reduction)
    torch.testing.assert_close(per_head, torch.tensor([BY_HAND_PER_HEAD[reduction]]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lacking", ["queries", "image", "system"])
def test_undefined_is_nan_and_is_left_out(reduction: str, lacking: str) -> None:
    image, system, queries = IMAGE.clone(), SYSTEM.clone(), QUERIES.clone()
    {"queries": queries, "image": image[0], "system": system[0]}[lacking][1] = 0
    score = visual_attention_score(image, system, queries, reduction=reduction)
    assert score[1].isnan()
    assert math.isclose(score[0], BY_HAND[reduction][0], rel_tol=1e-6)
    alone = vas_map(IMAGE[:, :1], SYSTEM[:, :1], QUERIES[:1], reduction=reduction)
    torch.testing.assert_close(vas_map(image, system, queries, reduction=reduction), alone)
    metric = VisualAttentionScore(reduction)
    metric.update(image, system, queries)
    torch.testing.assert_close(metric.compute(), score[0])


def test_a_head_without_system_mass_stays_finite() -> None:
    system = SYSTEM.clone()
    system[0, 0, 0] = 0.0
    for reduction in REDUCTIONS:
        assert visual_attention_score(IMAGE, system, QUERIES, reduction=reduction).isfinite().all()


def test_metric_is_the_mean_over_samples_whatever_the_batches() -> None:
    whole, parts = VisualAttentionScore(), VisualAttentionScore()
    whole.update(IMAGE, SYSTEM, QUERIES)
    for b in (0, 1):
        parts.update(IMAGE[:, b : b + 1], SYSTEM[:, b : b + 1], QUERIES[b : b + 1])
    torch.testing.assert_close(whole.compute(), torch.tensor(sum(BY_HAND["mean_of_ratios"]) / 2))
    torch.testing.assert_close(parts.compute(), whole.compute())


def test_metric_of_nothing_is_nan() -> None:
    metric = VisualAttentionScore()
    metric.update(IMAGE, SYSTEM, torch.zeros_like(QUERIES))
    assert metric.compute().isnan()


def test_gradients_do_not_pile_up_in_the_metric() -> None:
    metric = VisualAttentionScore()
    metric.update(IMAGE.clone().requires_grad_(), SYSTEM, QUERIES)
    assert not metric.total.requires_grad


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metric = VisualAttentionScore()
    # Uneven on purpose: three samples on the first process, one on the second.
    for b in (0, 1, 0) if rank == 0 else (1,):
        metric.update(IMAGE[:, b : b + 1], SYSTEM[:, b : b + 1], QUERIES[b : b + 1])
    torch.save(metric.compute(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Forked, because a spawned process would import everything again, which takes seconds.
        torch.multiprocessing.start_processes(_process, (folder,), nprocs=2, start_method="fork")
        results: list[Tensor] = [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]
    first, second = BY_HAND["mean_of_ratios"]
    for result in results:
        torch.testing.assert_close(result, torch.tensor((2 * first + 2 * second) / 4))


@pytest.mark.parametrize(
    ("image", "queries", "match"),
    [(IMAGE[0], QUERIES, "masses have shapes"), (IMAGE[..., :2], QUERIES, "masses have shapes"),
     (IMAGE, QUERIES.long(), "expected bool"), (IMAGE, QUERIES[:1], "expected bool")],
)  # fmt: skip
def test_wrong_shapes(image: Tensor, queries: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        visual_attention_score(image, SYSTEM, queries)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="'mean' is unknown; choose one of mean_of_ratios"):
        VisualAttentionScore("mean")
    with pytest.raises(ValueError, match="is unknown"):
        visual_attention_score(IMAGE, SYSTEM, QUERIES, reduction="mean")
