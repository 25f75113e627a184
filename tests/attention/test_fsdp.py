"""Masses under FSDP2, which rebuilds keyword arguments, replaces classes and frees weights after each layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Module

from avar_lightning.attention import AttentionRecord, observe_attention
from avar_lightning.roles import Role
from tests.factories import Conversation, make_batch, tiny_vlm

BATCH = make_batch(Conversation(), Conversation(images=2))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of one process, which shards and gathers like any other."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def trained(model: Module) -> AttentionRecord:
    with observe_attention(model, BATCH.role_ids, queries=(Role.USER, Role.RESPONSE)) as record:
        loss = model(**BATCH.inputs, labels=BATCH.inputs["input_ids"]).loss
    (loss + (record.stacked() + 1e-3).log().mean()).backward()
    return record


@pytest.mark.parametrize("checkpointing", [False, True])
def test_masses_and_gradients_are_those_without(mesh: DeviceMesh, checkpointing: bool) -> None:
    plain, sharded = tiny_vlm().train(), tiny_vlm().train()
    if checkpointing:
        sharded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in sharded.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    torch.testing.assert_close(trained(sharded).stacked(), trained(plain).stacked())
    sharded_parameters = dict(sharded.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(sharded_parameters[name].grad.full_tensor(), parameter.grad, msg=name)
