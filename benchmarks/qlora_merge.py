"""What merging does to adapters that were trained on 4-bit weights: loss and accuracy of each way, on the demo.

One training with `configs/qlora.yaml`'s weights (NF4, double quantisation), in float32, and beside it one with the same
adapters on whole weights. Then the first is measured as trained, with adapters on whole weights, merged into whole
weights, and merged into 4-bit weights, which rounds base plus adapters. Writes a table to benchmarks/results/.

    python benchmarks/qlora_merge.py
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from measuring import about, write
from peft import PeftModel

from avar_lightning import SFTModule
from avar_lightning.data import DemoDataModule
from avar_lightning.guidance import GuidanceConfig
from avar_lightning.merging import merge_adapters
from avar_lightning.model import LoRAConfig, VLMConfig, load_model
from avar_lightning.module import OptimizerConfig
from avar_lightning.quantization import QuantizationConfig

WHOLE = VLMConfig("demo", lora=LoRAConfig(r=16, alpha=32))
IN_4_BITS = replace(WHOLE, quantization=QuantizationConfig())
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def module_of(vlm: VLMConfig, model: torch.nn.Module | None = None) -> SFTModule:
    torch.manual_seed(0)
    module = SFTModule(vlm, GuidanceConfig(form="hinge"), OptimizerConfig(lr=2e-3, betas=(0.9, 0.98)), 144)
    if model is not None:
        module.model, module.vectors = model, set()
    return module


def trained(vlm: VLMConfig, data: DemoDataModule, steps: int) -> SFTModule:
    module = module_of(vlm)
    options = {"max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": False, "gradient_clip_val": 1.0}
    L.Trainer(**QUIET, **options).fit(module, data)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=tempfile.gettempdir() + "/qlora_merge")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def data() -> DemoDataModule:
        return DemoDataModule(options.folder, style="anchored", batch_size=16, num_val=options.val, num_workers=0)

    base, in_4_bits = trained(WHOLE, data(), options.steps), trained(IN_4_BITS, data(), options.steps)
    adapters = in_4_bits.save_pretrained(Path(options.folder) / "adapters")
    moved = PeftModel.from_pretrained(load_model("demo"), str(adapters))
    ways: dict[str, SFTModule | None] = {
        "no training": module_of(VLMConfig("demo"), load_model("demo")),
        "LoRA": base,
        "QLoRA as trained": in_4_bits,
        "QLoRA, adapters on whole weights": module_of(WHOLE, moved),
        "QLoRA, merged into whole weights": module_of(VLMConfig("demo"), merge_adapters(adapters, "demo")),
        "QLoRA, merged into 4-bit weights": None,  # last: it changes the model that was trained
    }
    rows = []
    for name, module in ways.items():
        if module is None:
            rounded: torch.nn.Module = in_4_bits.model.merge_and_unload()  # type: ignore[operator]
            module = module_of(VLMConfig("demo"), rounded)
        found = L.Trainer(**QUIET).validate(module, data(), verbose=False)[0]
        rows.append({"model": name, "val/loss": found["val/loss"], "val/accuracy": found["val/accuracy"]})
        print(rows[-1], flush=True)
    settings = {"steps": options.steps, "samples": options.val} | about("cpu", options.threads)
    lines = ["# Merging adapters that were trained on 4-bit weights", ""]
    lines += [", ".join(f"{name} {value}" for name, value in settings.items()) + ".", ""]
    lines += ["| model | val/loss | val/accuracy |", "|---|---|---|"]
    lines += [f"| {row['model']} | {row['val/loss']:.4f} | {row['val/accuracy']:.3f} |" for row in rows]
    write(Path(__file__).parent / "results" / "qlora_merge_cpu.csv", rows, settings, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
