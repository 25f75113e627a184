"""Optional libraries: whether they are installed, import, and do their work on this machine's device.

Each is used elsewhere in one file of its own; here it is only tried, so it is imported by its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def libraries(finding: Callable[..., Any]) -> Iterator[Any]:
    """A finding for each optional library."""
    cuda = torch.cuda.is_available()
    for name, module, versions, needs in (
        ("flash_attention_2", "flash_attn", (8, 0), "pip install flash-attn --no-build-isolation"),
        ("flash_attention_3", "flash_attn_interface", (9, 0), "build it from the hopper folder of its repository"),
    ):
        use = f"vlm.attn_implementation {name} (sdpa does without)"
        if not cuda:
            yield finding(name, "note", "no GPU to run on", use)
        elif torch.cuda.get_device_capability() < versions:
            yield finding(name, "note", f"this GPU is older than compute capability {versions[0]}.{versions[1]}", use)
        elif find_spec(module) is None:
            yield finding(name, "note", "not installed", use, needs)
        else:
            yield _tried(finding, name, use, needs, partial(_flash, module))
    yield _flex(finding)
    use, fix = "vlm.quantization (QLoRA)", "pip install 'avar-lightning[qlora]'"
    if find_spec("bitsandbytes") is None:
        yield finding("bitsandbytes", "note", "not installed", use, fix)
    else:
        yield _tried(finding, "bitsandbytes", use, "pip install --upgrade bitsandbytes", _quantise)
    for name, module, use, fix in (
        ("liger", "liger_kernel", "scoring.kernel liger, the fused LM loss (auto does without)",
         "pip install 'avar-lightning[liger]'"),
        ("torchvision", "torchvision", "video only; pictures do without", ""),
        ("vllm", "vllm", "a rollout server for GRPO, usually in an environment of its own",
         "pip install vllm in another environment (docs/grpo.md)"),
    ):  # fmt: skip
        if find_spec(module) is None:
            yield finding(name, "note", "not installed", use, fix)
        elif name == "liger" and not cuda:
            yield finding(name, "note", "installed, and no GPU to run on", use)
        else:
            yield finding(name, "ok", "installed")


def _tried(finding: Callable[..., Any], name: str, use: str, fix: str, work: Callable[[], str]) -> Any:
    try:
        return finding(name, "ok", work())
    # Whatever a broken build raises (a missing symbol, a kernel for another GPU) is what is to be told.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        return finding(name, "missing", f"installed, and fails: {type(error).__name__}: {reason}", use, fix)


def _flash(module: str) -> str:
    q = torch.randn(1, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    import_module(module).flash_attn_func(q, q, q, causal=True)
    return "works"


def _quantise() -> str:
    functional = import_module("bitsandbytes.functional")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
    packed, state = functional.quantize_4bit(weights, quant_type="nf4")
    error = float((functional.dequantize_4bit(packed, state) - weights).abs().max())
    if not error < 0.2:
        raise RuntimeError(f"NF4 on {device} is off by {error:.2g}")
    return f"NF4 works on {device}"


def _flex(finding: Callable[..., Any]) -> Any:
    use = "vlm.attn_implementation flex_attention (sdpa does without)"
    if torch.cuda.is_available():
        if find_spec("triton") is None:
            return finding("flex_attention", "missing", "triton is not installed", use, "pip install triton")
        return finding("flex_attention", "ok", "triton is there")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return finding("flex_attention", "note", "no C++ compiler", use, "apt-get install g++")
    return finding("flex_attention", "ok", f"compiles with {compiler}")
