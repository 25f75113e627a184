"""Devices that a run may use: the ones of this machine, and well-known ones that it has not."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

GIB = 2**30
DEFAULT_UTILISATION = 0.4


@dataclass(frozen=True)
class Device:
    """What an estimate asks of a device.

    Attributes:
        name: As its maker calls it.
        memory: Bytes that its programs can use.
        bf16: Dense bfloat16 products with float32 sums, in floating point operations a second; None where it has none.
        fp32: The same in plain float32.
        bandwidth: Bytes a second from its memory.
        is_cpu: Whether it is this machine's CPU.
        measured: Whether the speeds were measured here rather than taken from the maker.
    """

    name: str
    memory: float
    bf16: float | None
    fp32: float
    bandwidth: float
    is_cpu: bool = False
    measured: bool = False


def _gpu(name: str, gib: float, bf16: float | None, fp32: float, gigabytes_per_second: float) -> Device:
    tera = 1e12
    return Device(name, gib * GIB, bf16 and bf16 * tera, fp32 * tera, gigabytes_per_second * 1e9)


KNOWN = (
    _gpu("B200 180GB", 178.4, 2250, 75, 8000),
    _gpu("H200 141GB", 139.8, 989, 67, 4800),
    _gpu("H100 80GB", 79.1, 989, 67, 3350),
    _gpu("H100 PCIe 80GB", 79.1, 756, 51, 2000),
    _gpu("A100 80GB", 79.1, 312, 19.5, 2039),
    _gpu("A100 40GB", 39.4, 312, 19.5, 1555),
    _gpu("L40S 48GB", 44.4, 362, 91.6, 864),
    _gpu("RTX A6000 48GB", 47.4, 155, 38.7, 768),
    _gpu("RTX 5090 32GB", 31.3, 209, 104.8, 1792),
    _gpu("RTX 4090 24GB", 23.5, 165, 82.6, 1008),
    _gpu("RTX 3090 24GB", 23.5, 71, 35.6, 936),
    _gpu("A10G 24GB", 22.0, 70, 31.2, 600),
    _gpu("L4 24GB", 22.0, 121, 30.3, 300),
    _gpu("V100 32GB", 31.7, None, 15.7, 900),
    _gpu("T4 16GB", 14.6, None, 8.1, 320),
)
"""Dense peaks, without sparsity, from data sheets (SXM where there are several); memory as CUDA reports it."""


def known_device(name: str) -> Device:
    """A device of `KNOWN` by its name or enough of it.

    Raises:
        ValueError: No device is called so, or devices of different speed are.

    >>> known_device("h100 80gb").name
    'H100 80GB'
    >>> known_device("NVIDIA GeForce RTX 4090").name
    'RTX 4090 24GB'
    """
    wanted = _words(name)
    exact = [device for device in KNOWN if _words(device.name) == wanted]
    found = exact or [d for d in KNOWN if wanted <= _words(d.name) or _model_words(d.name) <= wanted]
    # "H100 PCIe" is also called "H100": the one that says more wins where it was said.
    longest = max((len(_model_words(device.name) & wanted) for device in found), default=0)
    found = [device for device in found if len(_model_words(device.name) & wanted) == longest]
    if exact or len(found) == 1:
        return found[0]
    if len({_model_words(device.name) for device in found}) == 1 and found:
        names = ", ".join(device.name for device in found)
        raise ValueError(f"--gpu {name!r} may be {names}; name one of them.")
    names = ", ".join(device.name for device in found or KNOWN)
    raise ValueError(f"--gpu {name!r} is not known, expected one of {names}; or give --memory in GiB.")


def _words(name: str) -> frozenset[str]:
    text = re.sub(r"(\d)\s*gi?b\b", r"\1gb", name.lower())
    noise = {"nvidia", "geforce", "hbm3", "sxm", "sxm4", "sxm5", "hbm2e", "tesla", "graphics", "hbm3e", "rtx"}
    return frozenset(re.split(r"[\s\-_]+", text)) - noise - {""}


def _model_words(name: str) -> frozenset[str]:
    return frozenset(word for word in _words(name) if not word.endswith("gb"))


def devices_here() -> list[Device]:
    """CUDA devices of this machine, or its CPU as the only one."""
    return [_cuda(index) for index in range(torch.cuda.device_count())] or [cpu_device()]


def with_memory(device: Device, gib: float) -> Device:
    """The device with another amount of memory."""
    return replace(device, memory=gib * GIB, name=f"{device.name}, {gib:g} GiB as said")


def unknown_device(gib: float) -> Device:
    """A GPU of which only the memory is known."""
    return replace(known_device("A100 80GB"), memory=gib * GIB, name=f"a GPU of {gib:g} GiB, as fast as an A100")


def _cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    total = float(torch.cuda.mem_get_info(index)[1])
    measured = _measured(f"cuda:{index}", size=8192)
    return Device(properties.name, total, *measured, measured=True)


def cpu_device() -> Device:
    """This machine's CPU, measured."""
    size = 1024
    _, fp32, bandwidth = _measured("cpu", size=size)
    # A CPU without bfloat16 units is slower in it than in float32, so what it does is what counts.
    bf16 = _speed(torch.randn(size, size).bfloat16())
    return Device(f"CPU, {torch.get_num_threads()} threads", available_memory(), bf16, fp32, bandwidth, True, True)


def _measured(device: str, *, size: int) -> tuple[float | None, float, float]:
    """Speed of bfloat16 and float32 products, and of copies."""
    left = torch.randn(size, size, device=device)
    bf16 = _speed(left.bfloat16()) if device != "cpu" and torch.cuda.is_bf16_supported() else None
    block = torch.empty(2**26 if device == "cpu" else 2**29, dtype=torch.uint8, device=device)
    seconds = _seconds(lambda: block.clone(), device)
    return bf16, _speed(left), 2 * block.numel() / seconds


def _speed(left: torch.Tensor) -> float:
    return 2 * left.shape[0] ** 3 / _seconds(lambda: left @ left, left.device.type)


def _seconds(run: object, device: str) -> float:
    """Shortest of a few runs, the first left out."""
    assert callable(run)
    found = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def available_memory() -> float:
    """Bytes of host memory that a new program can have: the smaller of the machine's and of this container's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = float(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, float(text) - float(used.read_text()))
    return max(free, 0.0)


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
