"""Everything that `avar doctor` finds out, as data and as text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from avar_lightning.doctor.compute import Timing, timing
from avar_lightning.doctor.fixes import Advice, advise, fits
from avar_lightning.doctor.hardware import (
    DEFAULT_UTILISATION,
    GIB,
    Device,
    cpu_device,
    devices_here,
    known_device,
    unknown_device,
    with_memory,
)
from avar_lightning.doctor.machine import Finding, examine
from avar_lightning.doctor.memory import Memory, memory
from avar_lightning.doctor.needs import unmet
from avar_lightning.doctor.plan import Plan
from avar_lightning.doctor.reading import plan_of, read_config, vlm_of
from avar_lightning.doctor.report import estimate_report, in_short, machine_report, verdict
from avar_lightning.doctor.shape import Shape, shape_of
from avar_lightning.doctor.workload import Given
from avar_lightning.model import VLMConfig, load_model


@dataclass(frozen=True)
class DoctorConfig:
    """What is asked.

    Attributes:
        arguments: Of `train.py fit`: configuration files and overrides; none to look at the machine only.
        gpu: A device to estimate for, instead of this machine's.
        memory: Its memory in GiB, instead of its own.
        utilisation: Share of a device's peak that products reach.
        given: What is said about hardware and data.
        explain: Whether everything is told.
    """

    arguments: Sequence[str] = ()
    gpu: str | None = None
    memory: float | None = None
    utilisation: float = DEFAULT_UTILISATION
    given: Given = field(default_factory=Given)
    explain: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: About the machine.
        problems: A sentence for each thing for which the configuration cannot run.
        text: All of it, to be read.
        memory: The estimate; None without a configuration.
        timing: The same.
        advice: What would make it fit, where it does not.
    """

    findings: list[Finding]
    problems: list[str]
    text: str
    shape: Shape | None = None
    plan: Plan | None = None
    memory: Memory | None = None
    timing: Timing | None = None
    advice: tuple[list[Advice], list[Advice]] | None = None


def diagnose(asked: DoctorConfig) -> Diagnosis:
    """Look at the machine, and estimate a configuration where one is given.

    Raises:
        ValueError: Something that was asked cannot be estimated.
        FileNotFoundError: The model's configuration is not on this machine and cannot be fetched.
    """
    here = asked.gpu is None and asked.memory is None
    if asked.gpu is not None:
        known_device(asked.gpu)  # a name that means nothing is told before anything is read
    if not asked.arguments:
        findings = examine()
        broken = [f"{found.name}: {found.detail}; {found.fix}." for found in findings if found.state == "missing"]
        return Diagnosis(findings, broken, machine_report(findings))
    config = read_config(asked.arguments)
    findings = examine(config.trainer.default_root_dir or ".")
    devices = _devices(asked, config.trainer.accelerator)
    device, shapes = devices[0], _Shapes()
    shape = shapes(vlm_of(config))
    plan = plan_of(config, shape, devices, asked.given)
    estimate, times = memory(shape, plan, device), timing(shape, plan, device, asked.utilisation)
    problems = unmet(config, findings, here=here)
    advice = None
    if not fits(estimate, device):
        advice = advise(plan, device, shapes)
        problems.append(_does_not_fit(estimate, device, advice))
    parts = [machine_report(findings)] if here or asked.explain else []
    parts += [estimate_report(shape, plan, device, estimate, times, explain=asked.explain)]
    parts += ["", "In short", "--------", in_short(plan, device, estimate, times), verdict(estimate, device, advice)]
    return Diagnosis(findings, problems, "\n".join(parts), shape, plan, estimate, times, advice)


def _does_not_fit(estimate: Memory, device: Device, advice: tuple[list[Advice], list[Advice]]) -> str:
    alone, together = advice
    single = next((found for found in alone if found.fits), None)
    if single is not None:
        fix = f"add {single.fix.option}"
    elif together and together[-1].fits:
        fix = f"add {' '.join(found.fix.option for found in together)}"
    else:
        fix = "use more or larger devices, or a smaller model"
    return f"It needs {estimate.total / GIB:.1f} GiB and {device.name} has {device.memory / GIB:.1f}: {fix}."


def _devices(asked: DoctorConfig, accelerator: str) -> list[Device]:
    """Those that are asked about: named ones, or this machine's."""
    if asked.gpu is not None:
        device = known_device(asked.gpu)
        return [device if asked.memory is None else with_memory(device, asked.memory)]
    if asked.memory is not None:
        found = devices_here()[0]
        return [unknown_device(asked.memory) if found.is_cpu else with_memory(found, asked.memory)]
    return [cpu_device()] if accelerator == "cpu" else devices_here()


class _Shapes:
    """Shapes of models, built once each."""

    def __init__(self) -> None:
        self._known: dict[str, Shape] = {}

    def __call__(self, vlm: VLMConfig) -> Shape:
        if repr(vlm) not in self._known:
            self._known[repr(vlm)] = shape_of(_without_weights(vlm))
        return self._known[repr(vlm)]


def _without_weights(vlm: VLMConfig) -> nn.Module:
    # Which kernel runs changes no shape, and one that this machine has not can still be asked about.
    kernel = vlm.attn_implementation
    buildable = kernel if kernel in ("eager", "sdpa") else "sdpa"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_model(replace(vlm, attn_implementation=buildable), on_meta=True)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise FileNotFoundError(
            f"The configuration of {vlm.pretrained!r} is not on this machine and the hub cannot be reached; fetch it "
            f"where there is a network (hf download {vlm.pretrained} config.json --local-dir FOLDER) and set "
            "--model.init_args.vlm.pretrained FOLDER."
        ) from error
