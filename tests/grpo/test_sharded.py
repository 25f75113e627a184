"""Rollouts, rewards and updates where two processes share the weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.grpo import sharded
from tests.grpo.test_grpo_module import one_by_one

SCRIPT = Path(sharded.__file__)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_processes_that_share_the_weights_learn_as_one_would(tmp_path, precision):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, tmp_path]
    done = subprocess.run([*map(str, command), precision], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name, tensor in states[0]["weights"].items():
        assert torch.equal(tensor, states[1]["weights"][name])
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in states[0]["weights"].items():
        torch.testing.assert_close(exported[name.removeprefix("model.")], tensor, msg=name)
    assert (tmp_path / "resumed.txt").read_text() == "4"
    assert (tmp_path / "completions" / "step_00000002.jsonl").is_file()
    rollouts = [state["rollouts"] for state in states]
    assert rollouts[0].texts != rollouts[1].texts
    twin = sharded.module()
    twin.configure_model()
    twin.eval()
    moved = [not torch.equal(p, states[0]["weights"][n]) for n, p in twin.named_parameters()]
    assert all(moved) or precision != "32-true"
    if precision != "32-true":
        return
    logps = [one_by_one(twin.model, part, 2.0) for part in rollouts]
    ours = [row for part in logps for row in part]
    for row, old in zip(ours, [row for part in rollouts for row in part.old_logps], strict=True):
        torch.testing.assert_close(old.double(), row.detach(), rtol=1e-3, atol=1e-4)
    advantages = torch.cat([part.advantages for part in rollouts])
    assert advantages.ne(0).any()
    losses = [-((row - row.detach()).exp() * advantage).mean() for row, advantage in zip(ours, advantages, strict=True)]
    (sum(losses) / len(losses)).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(states[0]["gradients"][name], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
