"""What this machine can run: one finding for each thing, with what it is for and what mends it."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from avar_lightning.doctor.hardware import GIB, available_memory, cpu_cores
from avar_lightning.doctor.libraries import libraries

State = Literal["ok", "note", "missing"]
TESTED = {"torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 23)), "lightning": ((2, 6), (2, 6))}
"""Lowest and highest versions with which the whole suite passed."""
LEAST_SHARED_MEMORY = 1.0 * GIB
LEAST_FREE_DISK = 10.0 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Of the thing; configurations ask for it by this name.
        state: `note` where something works and could be better, or is absent and seldom needed.
        detail: What was found.
        use: What it is needed for.
        fix: The command or setting that mends it, where something is to be mended.
    """

    name: str
    state: State
    detail: str
    use: str = ""
    fix: str = ""


def examine(root: str | Path = ".") -> list[Finding]:
    """Look at everything; takes some seconds.

    Args:
        root: Folder in which runs will write.
    """
    return [*_versions(), *_gpus(), *libraries(Finding), *_host(Path(root)), *_communication()]


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    for name, (low, high) in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        numbers = tuple(int(part) for part in found.split(".")[:2]) if found else ()
        span = (
            f"tested with {low[0]}.{low[1]} to {high[0]}.{high[1]}" if low != high else f"tested with {low[0]}.{low[1]}"
        )
        if not found or numbers < low:
            yield Finding(
                name, "missing", found or "not installed", "everything", f"pip install '{name}>={_dots(low)}'"
            )
        elif numbers > high:
            yield Finding(name, "note", f"{found}, newer than what was tested", "everything", span)
        else:
            yield Finding(name, "ok", f"{found} ({span})")


def _dots(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        use = "models beyond the demo's size"
        if built is None:
            fix = "on a machine with an NVIDIA GPU: make train TORCH_INDEX=https://download.pytorch.org/whl/cu130"
            yield Finding("cuda", "note", f"none: torch {torch.__version__} is a CPU build", use, fix)
        else:
            fix = "check that nvidia-smi lists a GPU and that its driver is new enough for this CUDA"
            yield Finding("cuda", "note", f"none: torch is built for CUDA {built} and sees no GPU", use, fix)
        yield Finding("bf16", "note", "on the CPU: works, seldom faster than float32", "trainer.precision bf16-mixed")
        return
    yield Finding("cuda", "ok", f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} device(s)")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        own = torch.cuda.get_device_properties(index)
        taken = free < 0.9 * total
        yield Finding(
            f"gpu {index}",
            "note" if taken else "ok",
            f"{own.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability {own.major}.{own.minor}",
            "" if not taken else "all of its memory",
            "" if not taken else "another program holds the rest: find it with nvidia-smi and end it",
        )
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bf16", "ok", "supported")
    else:
        fix = "set trainer.precision to 16-mixed (SFT) or 32-true"
        yield Finding("bf16", "missing", "this GPU has none", "trainer.precision bf16-mixed", fix)


def _host(root: Path) -> Iterator[Finding]:
    yield Finding("cpu", "ok", f"{cpu_cores()} core(s) for this process")
    yield Finding("memory", "ok", f"{available_memory() / GIB:.1f} GiB free")
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    low = free < LEAST_FREE_DISK
    fix = "set --trainer.default_root_dir and the logger's save_dir to a larger disk" if low else ""
    yield Finding(
        "disk", "note" if low else "ok", f"{free / GIB:.0f} GiB free at {there}", "checkpoints" if low else "", fix
    )
    if not os.access(there, os.W_OK):
        yield Finding("writing", "missing", f"{there} cannot be written", "runs", "set --trainer.default_root_dir")
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).free if shm.is_dir() else 0
    if size < LEAST_SHARED_MEMORY:
        fix = "start the container with --shm-size=8g (or --ipc=host), or set --data.init_args.num_workers 0"
        yield Finding("/dev/shm", "missing", f"{size / GIB:.2f} GiB free", "batches from data workers", fix)
    else:
        yield Finding("/dev/shm", "ok", f"{size / GIB:.1f} GiB free")


def _communication() -> Iterator[Finding]:
    if not dist.is_available():
        yield Finding(
            "distributed", "missing", "torch is built without it", "several processes", "install another torch"
        )
        return
    gloo = dist.is_gloo_available() and _one_process_runs()
    yield (
        Finding("gloo", "ok", "works")
        if gloo
        else Finding(
            "gloo", "missing", "does not start", "several CPU processes", "check that the machine's own name resolves"
        )
    )
    if torch.cuda.is_available():
        nccl = dist.is_nccl_available()
        yield (
            Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
            if nccl
            else Finding(
                "nccl",
                "missing",
                "torch is built without it",
                "several GPUs",
                "install a CUDA build of torch for Linux",
            )
        )


def _one_process_runs() -> bool:
    """Whether a group of one process can be made, which opens a port on this machine."""
    if dist.is_initialized():
        return True
    with tempfile.TemporaryDirectory() as folder:
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        except (RuntimeError, ValueError):
            return False
        dist.destroy_process_group()
    return True
