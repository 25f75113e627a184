"""Sums over samples, batches and processes come to the same means."""

import math

import numpy as np
import pytest
import torch

from avar_lightning.callbacks.measurement import Measurement, NanMean, merge
from avar_lightning.roles import Role

ROLES = torch.tensor(
    [
        [Role.SYSTEM, Role.IMAGE, Role.USER, Role.USER, Role.RESPONSE],
        [Role.SYSTEM, Role.USER, Role.USER, Role.RESPONSE, Role.OTHER],
    ]
)


def masses(seed: int) -> torch.Tensor:
    """Random masses (L=2, B=2, H=3, N=5, G=4); the second sample has no image."""
    mass = torch.rand(2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(seed)) / 4
    mass[:, 1, ..., 0] = 0
    return mass


def measured(*seeds: int) -> Measurement:
    result = Measurement(("user", "response"))
    for seed in seeds:
        result.update(masses(seed), ROLES, [f"{seed}a", f"{seed}b"], layers=[0, 3])
    return result


def test_one_sample_by_hand() -> None:
    result, mass = measured(0), masses(0)
    image, system = mass[:, 0, :, 2:4, 0], mass[:, 0, :, 2:4, 1]
    assert result.rows[0]["user"]["mean_of_ratios"] == pytest.approx((image / system).mean().item())
    assert math.isnan(result.rows[1]["user"]["mean_of_ratios"])
    assert result.mean("user", "mean_of_ratios") == result.rows[0]["user"]["mean_of_ratios"]
    np.testing.assert_allclose(result.maps["user"].value(), (image / system).mean(2), rtol=1e-6)
    shares = result.attention_shares("response")
    assert list(shares) == ["image", "system", "user", "response"]
    np.testing.assert_allclose(shares["system"], mass[:, 0, :, 4, 1].mean(1), rtol=1e-6)
    assert result.layers == [0, 3]


@pytest.mark.parametrize("split", [([0, 1], [2]), ([0], [1, 2]), ([0, 1, 2], []), ([], [0, 1, 2])])
def test_processes_that_share_the_batches_measure_what_one_does(split: tuple[list[int], list[int]]) -> None:
    alone, together = measured(0, 1, 2), merge(measured(*seeds) for seeds in split)
    assert [row["id"] for row in together.rows] == [row["id"] for row in alone.rows]
    assert (together.batches, together.layers) == (3, [0, 3])
    for query in ("user", "response"):
        one, two = alone.report(query), together.report(query)
        assert one["mean_of_ratios"] == two["mean_of_ratios"]
        np.testing.assert_allclose(one["map"], two["map"], rtol=1e-12)
        np.testing.assert_allclose(one["attention_shares"]["image"], two["attention_shares"]["image"], rtol=1e-12)


def test_a_sample_that_only_fills_up_a_batch_counts_nowhere() -> None:
    result = Measurement(("user",))
    result.update(masses(0), ROLES * torch.tensor([[1], [0]]), ["a", "b"], layers=[0, 3])
    assert [row["id"] for row in result.rows] == ["a"]


def test_nothing_measured_reports_nothing() -> None:
    report = merge([Measurement(("user",)), Measurement(("user",))]).report("user")
    assert math.isnan(report["median"])
    assert (report["map"], report["attention_shares"], report["num_scored"]) == (None, {}, 0)


def test_mean_skips_what_is_not_finite_element_by_element() -> None:
    mean = NanMean()
    for values in ([1.0, math.nan, math.nan], [3.0, 5.0, math.inf]):
        mean.add(np.array(values))
    np.testing.assert_array_equal(mean.value(), [2.0, 5.0, math.nan])
