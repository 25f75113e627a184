"""Two processes against one, also where one of them has no image: gradients, losses, weights, what is logged."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.sharding import training

EXACT = {"rtol": 2e-3, "atol": 2e-6}


def launch(folder, cases):
    training.prepare(folder, cases)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.sharding.training", str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("default"), training.CASES)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("slow"), training.SLOW_CASES)


def compare(folder, name, case):
    ours, theirs = (torch.load(folder / f"{name}_{rank}.pt") for rank in (0, 1))
    alone = training.train(replace(case, strategy="one"), folder, 1)
    mixed = case.precision != "32-true"
    # What one process leaves out where nothing has an image, two go through for nothing.
    spare = ours["gradients"].keys() - alone["gradients"].keys()
    assert not any(ours["gradients"].pop(weight).any() for weight in spare)
    assert all("visual" in weight for weight in spare)
    for found in ("gradients", "weights"):
        assert ours[found].keys() == alone[found].keys()
        for weight, tensor in alone[found].items():
            assert torch.equal(ours[found][weight], theirs[found][weight]), weight
            if found == "gradients" and not mixed:
                torch.testing.assert_close(ours[found][weight], tensor, **EXACT, msg=weight)
    if mixed:
        flat = [torch.cat([tensor.flatten() for tensor in run["gradients"].values()]) for run in (ours, alone)]
        assert torch.cosine_similarity(*flat, dim=0) > 0.99
    for step, expected in enumerate(alone["logged"]):
        for metric in expected.keys() & {"train/loss", "train/loss_lm", "train/mass_image", "train/image_share"}:
            # Later steps follow Adam, which divides small gradients by small ones.
            near = 5e-2 if mixed else (1e-4 if step == 0 else 1e-2)
            assert _same(ours["logged"][step][metric], expected[metric], near), (step, metric)
            assert _same(theirs["logged"][step][metric], expected[metric], near), (step, metric)
    assert ours["measured"].keys() == alone["measured"].keys()
    for metric, expected in alone["measured"].items():
        assert _same(ours["measured"][metric], expected, 0.1 if mixed else 2e-2), metric
        assert ours["measured"][metric] == theirs["measured"][metric] or math.isnan(expected)


def _same(found, expected, near):
    return math.isclose(found, expected, rel_tol=near, abs_tol=1e-6) or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("name", training.CASES)
def test_two_processes_are_one(default, name):
    compare(default, name, training.CASES[name])


@pytest.mark.slow
@pytest.mark.timeout(1000)  # the first one trains them all
@pytest.mark.parametrize("name", training.SLOW_CASES)
def test_two_processes_are_one_in_every_way(slow, name):
    compare(slow, name, training.SLOW_CASES[name])
