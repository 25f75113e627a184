"""A benchmark of our own and its shards: a picture and a letter to name, in groups of two that share a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from avar_lightning.benchmarks import Benchmark
from avar_lightning.data.sample import Sample
from avar_lightning.data.writer import write_shards


def pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy of answers, and of figures: all answers to one are right, within one draw."""
    figures: dict[Any, list[int]] = {}
    for row in rows:
        figures.setdefault((row["figure"], row.get("draw")), []).append(row["correct"])
    return {
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "figures": sum(all(each) for each in figures.values()) / len(figures),
    }


def letters(name: str, **options: Any) -> Benchmark:
    """Right is any answer with the sample's letter; rules read answers that have letters at all."""
    return Benchmark(
        name=name,
        title=name.title(),
        questions=5,
        hub=f"nobody/{name}",
        files=("*.parquet",),
        draft=lambda record, config: None,
        extract=lambda response, columns: response.strip()[:1] or None,
        score=lambda extracted, columns: extracted == columns["answer"],
        extraction_prompt=lambda response, columns: f"Item {columns['item']}: what is {response!r}?",
        read_judgement=lambda reply, columns: None if "none" in reply else reply.strip()[:1] or None,
        categories=("colour", "skills"),
        **options,
    )


LETTERS = letters("letters")
FIGURES = letters("figures", unit=lambda columns: columns["figure"], metrics=pairs)


def write_benchmark(folder: Path, name: str, count: int) -> str:
    """Prompts without a response, as avar convert --benchmark writes them."""

    def sample(index: int) -> Sample:
        parts = [{"type": "image"}, {"type": "text", "text": f"Which letter is number {index}?"}]
        messages = [{"role": "system", "content": "Look."}, {"role": "user", "content": parts}]
        picture = Image.effect_noise((56 + 28 * (index % 2), 56), 90).convert("RGB")
        columns = {"benchmark": name, "item": index, "figure": index // 2, "colour": ["red", "blue"][index % 2]}
        columns |= {"skills": ["look", "count"][: 1 + index % 2]}
        answer = "abc"[index % 3]
        if name == "mmstar":  # the real one; its options are what the demo model says of any picture
            columns |= {"question": "Which?", "options": {"A": "120", "B": "2", "C": "3"}, "category": "math"}
            answer = answer.upper()
        return Sample(messages, [picture], answer=answer, id=f"{name}-{index}", columns=columns)

    write_shards(map(sample, range(count)), folder, overwrite=True)
    return str(folder)
