"""A Lightning strategy for what ModelParallelStrategy leaves to be said by hand: all processes share the weights.

Importing this file registers it as `fsdp2` and `fsdp2_cpu_offload`, for `Trainer(strategy=…)` and `--trainer.strategy`.
"""

from __future__ import annotations

from datetime import timedelta

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP2Strategy(ModelParallelStrategy):
    """Share weights, gradients and optimizer states among all processes (FSDP2), on one node or many.

    Lightning's ModelParallelStrategy with one dimension, the size of the world, whatever that is.

    Args:
        cpu_offload: Keep them in host memory, and bring a layer to the device when it is its turn: slow, for what fits
            no other way.
        save_distributed_checkpoint: Each process writes its own part, into a folder; otherwise the first writes a file.
        process_group_backend: By default NCCL on GPUs, beside gloo where there is offloading, and gloo on CPUs.
        timeout: After which a collective operation that others have not joined is given up.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Make one dimension of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """Leave weights in host memory where they are offloaded; buffers are on the device already."""
        if not self.cpu_offload:
            super().model_to_device()

    def _get_process_group_backend(self) -> str:
        if self.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # norms of gradients are summed where the gradients are
        return super()._get_process_group_backend()


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2 over all processes")
StrategyRegistry.register("fsdp2_cpu_offload", FSDP2Strategy, "FSDP2 with weights in host memory", cpu_offload=True)
