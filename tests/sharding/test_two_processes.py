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
def folder(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("cases"), training.CASES)


def compare(folder, name, case):
    ours, theirs = (torch.load(folder / f"{name}_{rank}.pt") for rank in (0, 1))
    alone = training.train(replace(case, strategy="one"), folder, 1)
    mixed = case.precision != "32-true"
    # What one process leaves out where nothing has an image, two go through for nothing.
    spare = ours["gradients"].keys() - alone["gradients"].keys()
    assert not any(ours["gradients"].pop(weight).any() for weight in spare)
    assert all("visual" in weight for weight in spare)
    ours["clipped"] = {name: gradient for name, gradient in ours["clipped"].items() if name not in spare}
    for found in ("start", "gradients", "clipped", "weights", "buffers"):
        assert ours[found].keys() == alone[found].keys()
        for weight, tensor in ours[found].items():
            assert torch.equal(tensor, theirs[found][weight]), weight
    for weight, tensor in alone["buffers"].items():
        assert torch.equal(ours["buffers"][weight], tensor), weight
    if not mixed:
        for weight, tensor in alone["gradients"].items():
            torch.testing.assert_close(ours["gradients"][weight], tensor, **EXACT, msg=weight)
    for found in ("gradients", "clipped"):
        assert distance(ours[found], alone[found]) < (0.15 if mixed else 1e-3) * size(alone[found])
    # Adam divides small gradients by small ones, so single weights may differ; together they went the same way.
    moved = distance(alone["start"], alone["weights"])
    assert distance(ours["weights"], alone["weights"]) < (0.5 if mixed else 0.1) * moved
    for step, expected in enumerate(alone["logged"]):
        near = 5e-2 if mixed else (1e-3 if step == 0 else 1e-2)
        for metric, value in expected.items():
            assert _same(ours["logged"][step][metric], value, near), (step, metric)
            assert _same(theirs["logged"][step][metric], value, near), (step, metric)
    assert ours["measured"].keys() == alone["measured"].keys()
    for metric, expected in alone["measured"].items():
        assert _same(ours["measured"][metric], expected, 0.1 if mixed else 2e-2), metric
        assert ours["measured"][metric] == theirs["measured"][metric] or math.isnan(expected)


def distance(one, two):
    return math.sqrt(sum(float((one[name] - tensor).square().sum()) for name, tensor in two.items()))


def size(tensors):
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def _same(found, expected, near):
    return math.isclose(found, expected, rel_tol=near, abs_tol=1e-6) or (math.isnan(found) and math.isnan(expected))


@pytest.mark.slow
@pytest.mark.timeout(1000)  # the first one trains them all
@pytest.mark.parametrize("name", training.CASES)
def test_two_processes_are_one(folder, name):
    compare(folder, name, training.CASES[name])
