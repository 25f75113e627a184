"""`avar doctor` as it is called: what it prints, its exit status, and whether what it advises can be done."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from avar_lightning.commands import main
from avar_lightning.doctor import DoctorConfig, diagnose
from avar_lightning.doctor.hardware import GIB, KNOWN, Device, known_device, with_memory
from avar_lightning.doctor.machine import TESTED
from avar_lightning.doctor.plan import strategy_of
from avar_lightning.doctor.workload import Given

ROOT = Path(__file__).parents[2]
SFT, GRPO = (f"--config={ROOT}/configs/{name}.yaml" for name in ("avar_sft", "avar_grpo"))
FLASH = "--model.init_args.vlm.attn_implementation=flash_attention_2"
SAID = ["--length", "2048", "--image-tokens", "256"]


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    """The speed of this machine is of no interest here."""
    cpu = Device("a CPU", 16 * GIB, 1e11, 1e11, 1e10, is_cpu=True)
    monkeypatch.setattr("avar_lightning.doctor.hardware.cpu_device", lambda: cpu)


def architecture(name):
    return f"--model.init_args.vlm.pretrained={ROOT}/tests/architectures/{name}"


def test_a_machine_is_described_and_fine(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "transformers", "lightning", "cuda", "bitsandbytes", "gloo", "/dev/shm", "memory"):
        assert re.search(rf"^{name}\s+(ok|-)", out, re.M), name


def test_what_every_run_needs_and_is_missing_is_a_sentence_with_its_fix(capsys, monkeypatch):
    monkeypatch.setattr("avar_lightning.doctor.machine.LEAST_SHARED_MEMORY", float("inf"))
    monkeypatch.setitem(TESTED, "torch", ((99, 0), (99, 1)))
    assert main(["doctor"]) == 1
    streams = capsys.readouterr()
    assert "--shm-size=8g" in streams.err
    assert "pip install 'torch>=99.0'" in streams.err
    assert "transformers" in streams.out  # the report is whole all the same
    assert "Traceback" not in streams.err


def test_the_demo_is_measured_on_its_own_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = diagnose(DoctorConfig([SFT]))
    assert found.plan.lengths.source == "measured on 32 samples"
    assert (found.shape.num_parameters, found.plan.batch_size) == (1_342_752, 16)
    assert found.plan.kept_checkpoints == 2  # the newest, to which `last` leads, and the next one
    assert found.timing.updates == 300
    assert not found.problems
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.slow
def test_advice_can_be_followed_and_then_it_fits():
    """What is printed is added to the command as it stands, and read by the parser of training."""
    base = [SFT, architecture("qwen2_5_vl_7b"), "--data.init_args.batch_size=4", "--data.init_args.max_pixels=1003520"]
    given = Given(length=2048, image_tokens=256)
    first = diagnose(DoctorConfig(base, "RTX 4090", given=given))
    alone, together = first.advice
    assert first.problems
    assert first.memory.total > 23.5 * GIB
    advised = together or [next(advice for advice in alone if advice.fits)]
    options = " ".join(advice.fix.option for advice in advised).replace("configs/", f"{ROOT}/configs/").split()
    second = diagnose(DoctorConfig([*base, *options], "RTX 4090", given=given))
    assert not second.problems
    assert second.memory.total == pytest.approx(advised[-1].memory.total, rel=0.01)  # samples are as long as said


@pytest.mark.slow
def test_every_advised_option_is_read_as_it_is_meant():
    base = [GRPO, architecture("qwen2_5_vl_7b"), "--data.init_args.max_pixels=1003520"]
    base += ["--model.init_args.scoring.kernel=whole", "--trainer.devices=8", "--trainer.precision=bf16-mixed"]
    given = Given(length=2048, image_tokens=256)
    first = diagnose(DoctorConfig(base, "A100 40GB", given=given))
    alone = {advice.fix.option: advice for advice in first.advice[0]}
    assert len(alone) == 8
    for option in list(alone)[::3]:
        second = diagnose(
            DoctorConfig([*base, *option.replace("configs/", f"{ROOT}/configs/").split()], "A100 40GB", given=given)
        )
        # Fewer pixels shorten samples, which here are as long as was said.
        if "max_pixels" not in option:
            assert second.memory.total == pytest.approx(alone[option].memory.total), option


def test_a_run_that_does_not_fit_exits_with_one_and_says_what_to_add(capsys):
    assert main(["doctor", SFT, "--data.init_args.batch_size", "256", "--memory", "4", *SAID]) == 1
    streams = capsys.readouterr()
    assert "VERDICT: does not fit" in streams.out
    assert "of 4 GiB" in streams.out
    assert "add --data.init_args.batch_size 1 --trainer.accumulate_grad_batches 256." in streams.err


@pytest.mark.slow
def test_hardware_that_is_named_decides(capsys):
    assert main(["doctor", SFT, *SAID, "--gpu", "H100 80GB", "--devices", "8", "--num-nodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "VERDICT: fits" in out
    assert "989" not in out  # the demo is in float32
    assert "67 TFLOP/s" in out
    assert "2 × 8 devices, DDP" in out
    assert "This machine" not in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "Voodoo 2"], "is not known, expected one of"),
        (["--gpu", "A100"], "may be A100 80GB, A100 40GB"),
        (["--gpu", "L4", "--model.init_args.vlm.pretrained=Qwen/none"], "hf download Qwen/none config.json"),
        pytest.param(
            ["--trainer.accelerator=gpu", FLASH],
            "trainer.accelerator is gpu, and cuda is not to be had here",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence, capsys):
    assert main(["doctor", SFT, *options]) == 1
    err = capsys.readouterr().err
    assert sentence in err
    assert ("flash_attention_2 is not to be had here" in err) == (FLASH in options)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "options", [pytest.param(["--gpuu", "L4"], marks=pytest.mark.slow), ["--devices", "0"], ["--utilisation", "2"]]
)
def test_wrong_usage_is_status_two(options):
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", SFT, *options])


def test_strategies_are_told_apart_as_lightning_names_them():
    names = {"auto": None, "ddp_find_unused_parameters_true": "ddp", "fsdp": "fsdp1", "fsdp_cpu_offload": "fsdp1"}
    for name, kind in names.items():
        assert strategy_of(name)[0] == kind
    assert strategy_of("fsdp_cpu_offload")[1]["cpu_offload"]
    for whole in ({"class_path": "avar_lightning.strategies.FSDP2Strategy"}, "fsdp2", "fsdp2_cpu_offload"):
        kind, options = strategy_of(whole)
        assert (kind, options["data_parallel_size"]) == ("fsdp2", "all")
    assert strategy_of("fsdp2_cpu_offload")[1]["cpu_offload"]
    with pytest.raises(ValueError, match="'deepspeed' cannot be estimated, expected auto, ddp"):
        strategy_of("deepspeed")


def test_devices_are_found_by_what_people_call_them():
    assert known_device("NVIDIA H100 80GB HBM3").name == "H100 80GB"
    assert known_device("h100 pcie").name == "H100 PCIe 80GB"
    assert all(known_device(device.name) == device for device in KNOWN)
    assert with_memory(known_device("L4"), 10).memory == 10 * GIB


HEAD = re.compile(
    r"^# Estimate: avar doctor (?P<command>(?:.*\\\n# +)*.*)\n#   (?P<first>.*)\n#   (?P<second>.*)", re.M
)
OVERLAYS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if "# Estimate:" in path.read_text())


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.slow
def test_an_overlay_says_what_its_command_prints(overlay, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs" / f"{overlay}.yaml").read_text()
    found = HEAD.search(text)
    assert found, f"configs/{overlay}.yaml has no estimate of two lines below its command"
    name = yaml.safe_load(text)["model"]["init_args"]["vlm"]["pretrained"]
    folder = name.partition("/")[2].lower().replace(".", "_").replace("-", "_").removesuffix("_instruct")
    words = shlex.split(re.sub(r"\\\n# +", "", found["command"]))
    assert main(["doctor", *words, architecture(folder)]) == 0
    printed = capsys.readouterr().out.partition("In short\n--------\n")[2].splitlines()
    assert printed[:2] == [found["first"], found["second"]]
