"""A configuration, read as `train.py fit` reads it, as a plan. Nothing is started, written or loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import Namespace

from avar_lightning.attention import select_layers
from avar_lightning.cli import AvarCLI, command_line
from avar_lightning.doctor.hardware import Device
from avar_lightning.doctor.plan import Plan, Rollout, strategy_of
from avar_lightning.doctor.shape import Shape
from avar_lightning.doctor.workload import Given, lengths_of, num_samples
from avar_lightning.grpo import GRPOConfig, GRPOModule
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig, VLMModule, as_config
from avar_lightning.rollout import HFRolloutEngine, SamplingConfig
from avar_lightning.scoring import ScoringConfig


class _Reading(AvarCLI):
    """Parses, and stops before anything is built."""

    def _set_seed(self) -> None:
        """Nothing."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def read_config(arguments: Sequence[str]) -> Namespace:
    """What `train.py fit` would run with these arguments.

    Raises:
        SystemExit: The arguments are wrong (status 2, after one sentence).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that arguments of the process are not those of the parser
        cli = command_line(["fit", *arguments], kind=_Reading)
    config: Namespace = cli.config.fit
    return config


def vlm_of(config: Namespace) -> VLMConfig:
    """How the configured module loads its model.

    Raises:
        ValueError: The module is none of this package.
    """
    module = _class(config.model.class_path)
    if not issubclass(module, VLMModule):
        raise ValueError(
            f"model {config.model.class_path} cannot be estimated, expected avar_lightning.SFTModule or GRPOModule (or "
            "a class made from them); give a configuration of one of these."
        )
    return _as(VLMConfig, config.model.init_args.get("vlm"))


def plan_of(config: Namespace, shape: Shape, devices: Sequence[Device], given: Given) -> Plan:
    """The plan of a configuration, on given devices.

    Args:
        config: Of `read_config`.
        shape: Of its model.
        devices: Of one node.
        given: What was said about hardware and data on the command line.

    Raises:
        ValueError: Something in it cannot be estimated.
    """
    trainer, options = config.trainer, config.model.init_args
    strategy, settings = strategy_of(trainer.strategy)
    count = given.devices or _count(trainer.devices, trainer.accelerator, len(devices))
    nodes = given.num_nodes or int(trainer.num_nodes or 1)
    world = count * nodes
    strategy = strategy or ("single" if world == 1 else "ddp")
    data = config.data.get("init_args", Namespace()) if config.get("data") else Namespace()
    rollout = _rollout(options, data) if issubclass(_class(config.model.class_path), GRPOModule) else None
    guidance = None if rollout else _as(GuidanceConfig, options.get("guidance"))
    layers = len(shape.blocks_of("language"))
    if guidance is not None and guidance.layers is not None:
        select_layers(guidance.layers, layers)
    batch = int(data.get("batch_size") or 1)
    data_class = _class(config.data.class_path) if config.get("data") else None
    lengths = lengths_of(data_class, plain(data), shape, given, is_prompt=rollout is not None)
    return Plan(
        vlm=vlm_of(config),
        guidance=guidance if guidance is not None and guidance.active else None,
        scoring=_as(ScoringConfig, options.get("scoring")),
        rollout=rollout,
        strategy=strategy,
        shards=_shards(strategy, settings, count, nodes),
        offload=bool(settings.get("cpu_offload")),
        reshard=settings.get("sharding_strategy") not in ("SHARD_GRAD_OP", "NO_SHARD"),
        devices=count,
        num_nodes=nodes,
        precision=str(trainer.precision or "32-true"),
        batch_size=batch,
        micro_batch=batch if rollout is None else min(_grpo(options).micro_batch_size, batch * rollout.num_generations),
        accumulate=int(trainer.accumulate_grad_batches or 1),
        max_pixels=data.get("max_pixels"),
        lengths=lengths,
        num_samples=given.samples or num_samples(data_class, plain(data)),
        max_steps=int(trainer.max_steps if trainer.max_steps is not None else -1),
        max_epochs=trainer.max_epochs,
        num_workers=int(data.get("num_workers") or 0),
        kept_checkpoints=_kept(trainer),
    )


def plain(value: Any) -> Any:
    """A parsed value as dictionaries and lists."""
    if isinstance(value, Namespace):
        return {name: plain(inner) for name, inner in vars(value).items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def _as(kind: Any, value: Any) -> Any:
    return as_config(kind, plain(value))


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _grpo(options: Namespace) -> GRPOConfig:
    config: GRPOConfig = _as(GRPOConfig, options.get("grpo"))
    return config


def _rollout(options: Namespace, data: Namespace) -> Rollout:
    grpo, sampling = _grpo(options), _as(SamplingConfig, options.get("sampling"))
    engine: Mapping[str, Any] = options.get("rollout") or {"class_path": "avar_lightning.rollout.HFRolloutEngine"}
    in_process = issubclass(_class(engine["class_path"]), HFRolloutEngine)
    size = (engine.get("init_args") or {}).get("batch_size")
    adapters = bool(_as(VLMConfig, options.get("vlm")).lora)
    return Rollout(
        num_generations=grpo.num_generations,
        num_epochs=grpo.num_epochs,
        num_minibatches=grpo.num_minibatches,
        new_tokens=sampling.max_new_tokens,
        batch_size=size,
        in_process=in_process,
        has_reference=bool(grpo.beta) and not adapters,
        scores_all=options.get("visual") is not None or grpo.updates_per_batch > 1 or not in_process,
        kl=bool(grpo.beta),
    )


def _count(devices: Any, accelerator: str, available: int) -> int:
    """Processes a node, as Lightning reads `devices`."""
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("auto", "-1", "None"):
        return 1 if accelerator == "cpu" else available
    return int(text)


def _shards(strategy: str, settings: Mapping[str, Any], devices: int, nodes: int) -> int:
    if strategy == "fsdp1":
        kind = settings.get("sharding_strategy") or "FULL_SHARD"
        return {"NO_SHARD": 1, "HYBRID_SHARD": devices, "_HYBRID_SHARD_ZERO2": devices}.get(str(kind), devices * nodes)
    if strategy != "fsdp2":
        return 1
    size = settings.get("data_parallel_size", "auto")
    return {"auto": nodes, "all": devices * nodes}.get(str(size)) or int(size)


def _kept(trainer: Namespace) -> int:
    """Checkpoints on disk at the same time: those that are kept, and the one that is being written."""
    for callback in trainer.callbacks or []:
        if issubclass(_class(callback.class_path), ModelCheckpoint):
            own = callback.init_args
            best, last = max(int(own.get("save_top_k", 1)), 0), own.get("save_last")
            # The newest is among those that are kept, unless these are the best; then a link is no more to it.
            takes_none = last == "link" and best > 0 and own.get("monitor") is None
            return best + (bool(last) and not takes_none) + 1
    return 2


def optimizer_of(config: Namespace) -> OptimizerConfig:
    """AdamW's settings."""
    found: OptimizerConfig = _as(OptimizerConfig, config.model.init_args.get("optimizer"))
    return found
