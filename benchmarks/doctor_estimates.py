"""What `avar doctor` estimates beside what a training of the same command line takes: memory, operations and time.

Each case is a command line of `train.py fit`. It is given to the estimate, and then run for some updates in a process
of its own, on random models of Qwen2.5-VL's architecture. On a CPU memory is followed storage by storage as operations
make and drop them, on a GPU it is the allocator's own peak. Writes a CSV and a table to benchmarks/results/.

    python benchmarks/doctor_estimates.py
    python benchmarks/doctor_estimates.py --device cuda --hidden 2048 --layers 16 --vocabulary 152064 --length 4096
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measuring import about, page, rounded, synchronize, write
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig

from avar_lightning.cli import AvarCLI, command_line
from avar_lightning.data import write_shards
from avar_lightning.data.sample import Sample
from avar_lightning.doctor import DoctorConfig, diagnose
from avar_lightning.processing import load_processor

CHECKPOINTING = ("--model.init_args.vlm.gradient_checkpointing", "true")
PLAIN = ("--model.init_args.guidance.form", "none")
EAGER = ("--model.init_args.vlm.attn_implementation", "eager")
MIXED = ("--trainer.precision", "bf16-mixed")
WHOLE = ("--model.init_args.scoring.kernel", "whole")
CASES: dict[str, tuple[str, ...]] = {
    "full": PLAIN,
    "full, checkpointing": (*PLAIN, *CHECKPOINTING),
    "full, eager": (*PLAIN, *EAGER),
    "full, logits whole": (*PLAIN, *WHOLE),
    "full, accumulating": (*PLAIN, "--trainer.accumulate_grad_batches", "2"),
    "full, vision frozen": (*PLAIN, "--model.init_args.vlm.freeze", "[vision]"),
    "guided": (),
    "guided, checkpointing": CHECKPOINTING,
    "guided, eager, checkpointing": (*EAGER, *CHECKPOINTING),
    "LoRA": ("--config", "configs/lora.yaml"),
    "LoRA, checkpointing": ("--config", "configs/lora.yaml", *CHECKPOINTING),
    "bf16-mixed": (*PLAIN, *MIXED),
    "bf16-mixed, checkpointing": (*PLAIN, *MIXED, *CHECKPOINTING),
    "bf16-mixed, LoRA": (*PLAIN, *MIXED, "--config", "configs/lora.yaml"),
    "QLoRA": (*PLAIN, "--config", "configs/qlora.yaml"),
    "QLoRA, guided, checkpointing": ("--config", "configs/qlora.yaml", *CHECKPOINTING),
}
CPU_KERNELS = {  # which torch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
WARM_UP, TIMED = 1, 2


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, address: int) -> None:
        self.live -= self.sizes.pop(address)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return made


class Measure(L.Callback):
    """Measures one update after some others: time first, then operations, then memory."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.found: dict[str, float] = {}
        self.stack, self.memory, self.operations = ExitStack(), PeakMemory(), FlopCounterMode(display=False)
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        update, first = divmod(batch_idx, self.accumulate)
        if first:
            return
        on_cuda = module.device.type == "cuda"
        if update == WARM_UP + TIMED:
            counter = FlopCounterMode(display=False, custom_mapping=dict(CPU_KERNELS))
            self.operations = self.stack.enter_context(counter)
        elif update == WARM_UP + TIMED + 1:
            states = [x for state in trainer.optimizers[0].state.values() for x in state.values() if x.ndim]
            self.found["weights"] = _bytes(module.model.parameters())
            self.found["states"] = _bytes(states)
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                for tensor in (*module.model.parameters(), *states):
                    self.memory.add(tensor)
                self.stack.enter_context(self.memory)
        synchronize(module.device.type)
        self.started = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.found["gradients"] = _bytes(p.grad for p in module.model.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        update, last = divmod(batch_idx + 1, self.accumulate)
        if last:
            return
        synchronize(module.device.type)
        if WARM_UP < update <= WARM_UP + TIMED:
            self.seconds.append(time.perf_counter() - self.started)
        self.stack.close()
        self.found["flops"] = self.operations.get_total_flops()
        self.found["peak"] = torch.cuda.max_memory_allocated() if module.device.type == "cuda" else self.memory.peak
        self.found["seconds"] = min(self.seconds, default=0.0)


def _bytes(tensors: Any) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """A configuration of Qwen2.5-VL of the asked size, with the demo's processor."""
    load_processor("demo").save_pretrained(folder)
    config: Any = AutoConfig.from_pretrained("avar_lightning/data/demo_base")
    text, vision, heads = config.text_config, config.vision_config, args.hidden // 64
    text.hidden_size, text.num_hidden_layers, text.vocab_size = args.hidden, args.layers, args.vocabulary
    text.intermediate_size = 3 * args.hidden
    text.num_attention_heads, text.num_key_value_heads = heads, max(1, heads // 4)
    text.layer_types = ["full_attention"] * args.layers
    text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [8, 12, 12]}
    vision.out_hidden_size, vision.hidden_size, vision.depth = args.hidden, args.hidden // 2, 2
    vision.intermediate_size, vision.num_heads = args.hidden, heads
    text.max_position_embeddings = 65536
    config.save_pretrained(folder)


def make_shards(folder: Path, length: int) -> None:
    """Samples with one picture, a system message, and a response of about so many tokens."""
    picture = Image.effect_noise((256, 256), 64).convert("RGB")
    answer = " ".join(["the shape in row 1 is red ."] * (length // 8))
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    messages = [
        {"role": "system", "content": "Look at the picture before you answer. " * 4},
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
    ]
    write_shards([Sample(messages=messages, images=[picture]) for _ in range(64)], folder)


def options(args: argparse.Namespace, folder: Path, case: str) -> list[str]:
    """The command line of a case."""
    updates = (WARM_UP + TIMED + 2) * (2 if "accumulating" in case else 1)
    return [
        *("--config", "configs/avar_sft.yaml"),
        *CASES[case],
        *("--trainer.accelerator", "gpu" if args.device == "cuda" else "cpu", "--trainer.devices", "1"),
        *("--trainer.max_steps", str(updates), "--trainer.logger", "false", "--trainer.callbacks", "[]"),
        *("--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0"),
        *("--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", "1000"),
        *("--trainer.default_root_dir", str(folder)),
        *("--model.init_args.vlm.pretrained", str(folder / "model"), "--model.init_args.vlm.from_scratch", "true"),
        *("--data", "avar_lightning.data.ShardDataModule", "--data.init_args.train", str(folder / "shards")),
        *("--data.init_args.batch_size", str(args.batch), "--data.init_args.num_workers", "0"),
    ]


def run(args: argparse.Namespace, folder: Path, case: str) -> dict[str, Any]:
    """Estimate a case, and run it."""
    arguments = options(args, folder, case)
    found = diagnose(DoctorConfig(arguments))
    assert found.memory is not None
    assert found.timing is not None
    if "QLoRA" in case:  # random weights and 4 bits: transformers quantises what it reads
        save_random_weights(folder / "model")
        arguments += ["--model.init_args.vlm.from_scratch", "false"]
    measure = Measure(2 if "accumulating" in case else 1)

    class Measured(AvarCLI):
        def before_fit(self) -> None:
            self.trainer.callbacks.append(measure)

        def after_fit(self) -> None:
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command_line(["fit", *arguments], kind=Measured)
    real, memory, timing = measure.found, found.memory, found.timing
    fullest = memory.moments[memory.fullest]
    static = real["weights"] + real["states"]
    gradients = memory.moments["at the end of the backward"].get("gradients", 0.0)
    scales = memory.always["weights"] - real["weights"] if "QLoRA" in case else 0.0
    return {
        "case": case,
        "static_ratio": (sum(memory.always.values()) - scales) / static,
        "gradients_ratio": gradients / real["gradients"],
        "moment": memory.fullest,
        "rest_mib": rounded((real["peak"] - static) / 2**20),
        "rest_estimated_mib": rounded(sum(fullest.values()) / 2**20),
        "rest_ratio": rounded(sum(fullest.values()) / (real["peak"] - static)),
        "gflop": rounded(real["flops"] / 1e9),
        "gflop_ratio": rounded(timing.work.total / real["flops"]),
        "seconds": rounded(real["seconds"]),
        "seconds_ratio": rounded(timing.step / real["seconds"]),
    }


def save_random_weights(folder: Path) -> None:
    """Weights in the folder, for what can only be loaded."""
    from avar_lightning.model import VLMConfig, load_model

    load_model(VLMConfig(str(folder), from_scratch=True, dtype="bfloat16")).save_pretrained(folder)


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    return page(
        "avar doctor's estimates beside what was measured",
        settings,
        "Estimated over measured: weights and optimiser states, gradients, everything else at the peak, floating point "
        "operations of an update, and its seconds (at 40 % of the measured peak of products).",
        [
            "case",
            "weights, states",
            "gradients",
            "rest at the peak, MiB",
            "estimated / measured",
            "operations",
            "seconds",
        ],
        [
            [
                row["case"],
                f"{row['static_ratio']:.4f}",
                f"{row['gradients_ratio']:.4f}",
                str(row["rest_mib"]),
                f"{row['rest_ratio']:.2f}",
                f"{row['gflop_ratio']:.3f}",
                f"{row['seconds_ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--only", nargs=2, metavar=("FOLDER", "CASE"), help="one case in this process, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(run(args, Path(args.only[0]), args.only[1])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", args)
        make_shards(folder / "shards", args.length)
        own = [f"--{k}={getattr(args, k)}" for k in ("device", "hidden", "layers", "vocabulary", "length", "batch")]
        for case in args.cases:
            command = [sys.executable, __file__, *own, f"--threads={args.threads}", "--only", name, case]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(rows[-1], flush=True)
    names = ("hidden", "layers", "vocabulary", "length", "batch")
    settings = {name: getattr(args, name) for name in names} | about(args.device, args.threads)
    path = args.output or Path(__file__).parent / "results" / f"doctor_estimates_{args.device}.csv"
    write(path, rows, settings, table(rows, settings))


if __name__ == "__main__":
    main()
