"""A whole validation with VASCallback beside one without, which take turns in one process, round after round.

With and without generated answers; the callback measures the forward over the reference responses. Writes a CSV and a
table to benchmarks/results/.

    python benchmarks/vas_validation.py
    python benchmarks/vas_validation.py --device cuda --dtype bfloat16 --cases 7b-4-4096
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import lightning as L
import subjects
import torch
from measuring import about, as_cell, clock, hush, in_process, page, paired, parser_of, peak_of, write
from subjects import Case
from torch.utils.data import DataLoader

from avar_lightning import SFTModule
from avar_lightning.callbacks import VASCallback

BATCHES, NEW_TOKENS = 4, 16
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "without VAS": None,
    "without VAS, again": None,  # how far two equal validations lie apart
    "with VAS": {"num_overlays": 0},
    "with VAS and pictures": {},  # of the first four samples, which are all there are here
}
REFERENCE = "without VAS"


def validation(case: Case, module: SFTModule, name: str, device: str) -> float:
    """Seconds of one validation."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[] if CONTESTANTS[name] is None else [VASCallback(**CONTESTANTS[name])],
        )
        batches = DataLoader([batch_of(case, module.max_new_tokens > 0)] * BATCHES, batch_size=None)
        start = clock(device)
        trainer.validate(module, batches, verbose=False)
        return clock(device) - start


def batch_of(case: Case, answers: bool) -> dict[str, Any]:
    """Reference responses and, for answers, the prompts before them."""
    batch = subjects.make_batch(case.length)
    if answers:
        length = int((batch["labels"][0] >= 0).nonzero()[0])
        texts = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        batch["prompt"] = batch | texts | {"role_ids": batch["role_ids"][:, :length]}
        del batch["prompt"]["labels"]
    batch["columns"] = [{"id": "0", "answer": "0"}]
    return batch


def module_of(args: Any, case: Case, new_tokens: int) -> SFTModule:
    """What is validated."""
    module = SFTModule(max_new_tokens=new_tokens)
    module.load = lambda: case.build("sdpa", device=args.device, dtype=args.dtype)
    module.configure_model()
    return module


def measure_memory(args: Any, case: Case, new_tokens: int, name: str) -> float:
    """Peak of a validation above the model, in this process."""
    module = module_of(args, case, new_tokens).to(args.device)
    return peak_of(lambda: validation(case, module, name, args.device), args.device)


def measure_seconds(args: Any, case: Case, new_tokens: int) -> dict[str, list[float]]:
    """Seconds of every contestant in turn, after a round that warms up."""
    module = module_of(args, case, new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(args.repeats + 1):
        for name in CONTESTANTS:
            taken = validation(case, module, name, args.device)
            if number:
                seconds[name].append(taken)
    return seconds


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: seconds, and ratios to the validation without of the same round."""
    names = ("size", "layers", "length", "new_tokens", "validation")
    return page(
        "A validation with VASCallback",
        settings,
        "Ratios are to the validation without it of the same round, p50 (p20 to p80). Pictures are of the first four "
        "samples of a validation, which are all there are here.",
        ["model", "layers", "N", "new tokens", "validation", "seconds", "ratio", "peak MiB"],
        [
            [
                *(str(row[name]) for name in names),
                as_cell(row, "seconds"),
                as_cell(row, "ratio", digits=3),
                f"{row['peak_mib']:.0f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Measure everything, or one thing in a process of its own."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=["small-4-512", "small-4-2048", "medium-8-2048"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    if args.measure is not None:
        text, new_tokens, what = args.measure.split(":")
        of_what = args, Case.without_image(text), int(new_tokens)
        print(json.dumps(measure_seconds(*of_what) if what == "seconds" else measure_memory(*of_what, what)))
        return
    rows = []
    for text, case in [(text, Case.without_image(text)) for text in args.cases]:
        for new_tokens in (0, NEW_TOKENS):
            seconds = in_process(f"{text}:{new_tokens}:seconds")
            for name in CONTESTANTS:
                row = {"size": case.size, "layers": case.layers, "length": case.length, "new_tokens": new_tokens}
                row |= {"validation": name, "peak_mib": round(in_process(f"{text}:{new_tokens}:{name}"), 1)}
                row |= paired(seconds, name, REFERENCE)
                rows.append(row)
                print(row, flush=True)
    settings = {"dtype": args.dtype, "batches": BATCHES, "repeats": args.repeats} | about(args.device, args.threads)
    write(args.output / f"vas_validation_{args.device}.csv", rows, settings, table(rows, settings))


if __name__ == "__main__":
    main()
