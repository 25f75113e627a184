"""What `avar doctor` prints."""

from __future__ import annotations

from collections.abc import Sequence

from avar_lightning.doctor.compute import Timing
from avar_lightning.doctor.fixes import Advice, fits
from avar_lightning.doctor.hardware import GIB, Device
from avar_lightning.doctor.machine import Finding
from avar_lightning.doctor.memory import CUDA_CONTEXT, MARGIN, NCCL_BUFFERS, Memory
from avar_lightning.doctor.plan import Plan
from avar_lightning.doctor.shape import Shape

MARKS = {"ok": "ok", "note": "-", "missing": "MISSING"}


def machine_report(findings: Sequence[Finding]) -> str:
    """One line a finding, and below it what mends it."""
    lines = ["This machine", "============"]
    for finding in findings:
        lines.append(f"{finding.name:<18} {MARKS[finding.state]:<8} {finding.detail}")
        if finding.state != "ok":
            use = f"for {finding.use}" if finding.use else ""
            lines += [f"{'':<27} {text}" for text in (use, finding.fix and f"fix: {finding.fix}") if text]
    return "\n".join(lines)


def estimate_report(
    shape: Shape, plan: Plan, device: Device, memory: Memory, timing: Timing, *, explain: bool = False
) -> str:
    """Parameters, memory, time and the assumptions behind them."""
    lines = ["", "This configuration", "==================", _what(shape, plan), ""]
    lines += _parameters(shape)
    lines += ["", f"Memory of a device ({device.name})", "-" * 40]
    lines += [_gib(name, value) for name, value in memory.always.items()]
    lines += [f"{memory.fullest}:"]
    lines += [_gib(f"  {name}", value) for name, value in memory.moments[memory.fullest].items()]
    lines += [
        _gib("beside tensors", memory.extra),
        _gib(f"fragments ({MARGIN:.0%})", memory.margin),
        _gib("total", memory.total) + f" of {device.memory / GIB:.1f}",
    ]
    for name, parts in memory.moments.items():
        if name != memory.fullest:
            total = sum(parts.values()) + sum(memory.always.values()) + memory.extra + memory.margin
            lines.append(_gib(f"({name}: {', '.join(parts)})" if explain else f"({name})", total))
    lines += ["", "Host memory of a node", "-" * 40]
    lines += [_gib(name, value) for name, value in memory.host.items() if value]
    lines += [_gib("total", sum(memory.host.values()))]
    lines += ["", _gib("A checkpoint on disk", memory.checkpoint)]
    lines += [_gib(f"{plan.kept_checkpoints} of them and the exported model", memory.disk)]
    lines += ["", *_time(plan, device, timing), "", "Assumed", "-" * 40]
    lines += [f"- {text}" for text in assumptions(shape, plan, device, timing)]
    return "\n".join(lines)


def verdict(memory: Memory, device: Device, advice: tuple[list[Advice], list[Advice]] | None) -> str:
    """One line, and where it does not fit what would make it."""
    text = f"{memory.total / GIB:.1f} GiB estimated, {device.memory / GIB:.1f} GiB there ({device.name})"
    if fits(memory, device):
        return f"\nVERDICT: fits. {text}."
    lines = ["", f"VERDICT: does not fit. {text}."]
    alone, together = advice or ([], [])
    if alone:
        lines.append("What would help, from the cheapest on (each by itself):")
        lines += [_advice(found, "") for found in alone]
    if together:
        enough = "together they fit" if together[-1].fits else "together they do not suffice"
        lines.append(f"None is enough alone; {enough}:")
        lines += [_advice(found, "+ " if number else "") for number, found in enumerate(together)]
        if not together[-1].fits:
            lines.append("Use more devices, larger ones, or a smaller model.")
    return "\n".join(lines)


def in_short(plan: Plan, device: Device, memory: Memory, timing: Timing) -> str:
    """The estimate in two lines, for the head of a configuration."""
    hours = "" if timing.hours is None else f", {timing.updates:,.0f} updates in {timing.hours:,.3g} hours"
    host = sum(memory.host.values()) / GIB
    batch = f"{timing.step:.3g} s an update of {plan.sequences_per_step} sequences"
    return (
        f"{memory.total / GIB:.1f} of {device.memory / GIB:.1f} GiB a device ({device.name}), {host:.0f} GiB of host "
        f"memory a node, {memory.checkpoint / GIB:.1f} GiB a checkpoint\n"
        f"{batch} at {timing.utilisation:.0%} of the peak{hours}"
    )


def assumptions(shape: Shape, plan: Plan, device: Device, timing: Timing) -> list[str]:
    """Every assumption of an estimate, one sentence each."""
    lengths = plan.lengths
    found = [
        f"samples: longest {lengths.longest} tokens ({lengths.images} of images), mean {lengths.mean:.0f} "
        f"({lengths.mean_images:.0f}), {lengths.responses:.0%} carry loss: {lengths.source}",
        "memory: every sample of the fullest batch is as long as the longest",
        f"speed: {timing.utilisation:.0%} of {timing.peak / 1e12:.3g} TFLOP/s "
        f"({'measured here' if device.measured else 'dense peak of the data sheet'})",
        "attention: all pairs of tokens are counted, hidden ones too",
    ]
    if not device.is_cpu:
        nccl = f" and NCCL's {NCCL_BUFFERS / GIB:.1f}" if plan.world_size > 1 else ""
        found.append(f"beside tensors: CUDA's {CUDA_CONTEXT / GIB:.1f}{nccl} GiB")
    if plan.guidance:
        found.append(f"guidance: {timing.work.guidance / timing.work.total:.1%} of all operations")
    if timing.exchanged:
        found.append(
            f"communication: hidden behind products, for which {timing.exchanged / 1e9:.1f} GB in and out of each "
            f"device in an update need {timing.exchanged / timing.step / 1e9:.1f} GB/s"
        )
    if plan.rollout and not plan.rollout.in_process:
        found.append("sampling: a server does it, and its time is not in the estimate")
    if plan.rollout:
        found.append(f"completions: all of {plan.rollout.new_tokens} tokens, and all learned from")
    if shape.unknown > 0.05:
        found.append(
            f"NOT KNOWN: {shape.unknown:.0%} of the layers' weights are in modules that are not linear layers "
            "(mixtures of experts, say), and their work and activations are not counted"
        )
    return found


def _what(shape: Shape, plan: Plan) -> str:
    how = {"single": "one process", "ddp": "DDP", "fsdp1": "FSDP", "fsdp2": "FSDP2"}[plan.strategy]
    stage = "GRPO" if plan.rollout else "SFT" if plan.guidance is None else f"SFT guided by {plan.guidance.form}"
    parts = [shape.family, stage, plan.precision, plan.vlm.attn_implementation]
    parts += ["4-bit weights"] * (plan.vlm.quantization is not None) + ["LoRA"] * (plan.vlm.lora is not None)
    parts += ["gradient checkpointing"] * shape.checkpointing
    place = f"{plan.num_nodes} × {plan.devices} devices, {how}" if plan.world_size > 1 else how
    return ", ".join([*parts, place])


def _parameters(shape: Shape) -> list[str]:
    lines = [f"{'parameters':<36}{'all':>16}{'that train':>16}"]
    rows = [*shape.parts.items(), ("total", None)]
    for name, part in rows:
        total, trained = (part.total, part.trained) if part else (shape.num_parameters, shape.num_trained)
        lines.append(f"  {name:<34}{total:>16,}{trained:>16,}")
    return lines


def _time(plan: Plan, device: Device, timing: Timing) -> list[str]:
    work = timing.work
    batch = f"{plan.batch_size} × {plan.accumulate} × {plan.world_size}"
    lines = [
        f"Time of an update: {plan.sequences_per_step} sequences ({batch}), {timing.tokens:,.0f} tokens",
        "-" * 40,
        f"{'  floating point operations a device':<40}{work.total:>12.3g}",
        f"{'  of them computed a second time':<40}{work.recompute:>12.3g}",
        f"{'  seconds':<40}{timing.step:>12.3g}",
        f"{'  tokens a second, all devices':<40}{timing.tokens / timing.step:>12,.0f}",
    ]
    if timing.decoding:
        lines.append(f"{'  of the seconds, sampling':<40}{timing.decoding:>12.3g}")
    if timing.hours is not None:
        lines.append(f"{'  updates of the run':<40}{timing.updates:>12,.0f}")
        lines.append(f"{'  hours of the run':<40}{timing.hours:>12.3g}")
    else:
        lines.append("  hours of the run: the data's size is not known; give --samples")
    return lines


def _gib(name: str, value: float) -> str:
    return f"  {name:<48}{value / GIB:>10.2f} GiB" if value >= 0.01 * GIB else f"  {name:<48}{value / 2**20:>10.2f} MiB"


def _advice(advice: Advice, sign: str) -> str:
    mark = "fits" if advice.fits else "not enough"
    return f"  {sign}{advice.fix.option}\n      {advice.memory.total / GIB:.1f} GiB, {mark}; {advice.fix.cost}"
