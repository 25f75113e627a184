"""What a configuration asks of a machine that the machine has not: a sentence for each, with its fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avar_lightning.doctor.machine import Finding


def unmet(config: Any, findings: Sequence[Finding], *, here: bool) -> list[str]:
    """Sentences on what a configuration needs and is not there.

    Args:
        config: Of `read_config`.
        findings: Of `examine`.
        here: Whether it is to run on this machine; otherwise nothing is known of where it will.
    """
    if not here:
        return []
    by_name = {finding.name: finding for finding in findings}
    options, trainer = config.model.init_args, config.trainer
    vlm = options.get("vlm") or {}
    wanted: dict[str, str] = {}
    kernel = vlm.get("attn_implementation", "sdpa")
    if kernel in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        wanted[kernel] = f"vlm.attn_implementation is {kernel}"
    if vlm.get("quantization") is not None:
        wanted["bitsandbytes"] = "vlm.quantization is set"
    if (options.get("scoring") or {}).get("kernel") == "liger":
        wanted["liger"] = "scoring.kernel is liger"
    if trainer.accelerator in ("gpu", "cuda"):
        wanted["cuda"] = f"trainer.accelerator is {trainer.accelerator}"
    if str(trainer.precision).startswith("bf16") and by_name.get("bf16", Finding("", "ok", "")).state == "missing":
        wanted["bf16"] = f"trainer.precision is {trainer.precision}"
    found = [f"{finding.name}: {finding.detail}; {finding.fix}." for finding in findings if _is_broken(finding)]
    for name, reason in wanted.items():
        finding = by_name.get(name)
        if finding is None or finding.state != "ok":
            detail = finding.detail if finding else "not there"
            fix = finding.fix if finding and finding.fix else "choose another"
            found.append(f"{reason}, and {name} is not to be had here ({detail}): {fix}.")
    gpus = sum(finding.name.startswith("gpu ") for finding in findings)
    devices = trainer.devices
    if "cuda" not in wanted or gpus:
        asked = devices if isinstance(devices, int) else len(devices) if isinstance(devices, list) else 0
        if trainer.accelerator in ("gpu", "cuda") and asked > gpus:
            found.append(f"trainer.devices is {devices}, and there are {gpus} GPUs here: set --trainer.devices {gpus}.")
    return found


def _is_broken(finding: Finding) -> bool:
    """What every run needs."""
    needed = ("torch", "transformers", "lightning", "/dev/shm", "writing", "distributed")
    return finding.state == "missing" and finding.name in needed
