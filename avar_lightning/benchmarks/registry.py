"""The benchmarks by name, and their scorers as one reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avar_lightning.benchmarks.benchmark import Benchmark
from avar_lightning.benchmarks.hallusionbench import HALLUSIONBENCH
from avar_lightning.benchmarks.mathverse import MATHVERSE_VO
from avar_lightning.benchmarks.mathvision import MATHVISION
from avar_lightning.benchmarks.mathvista import MATHVISTA
from avar_lightning.benchmarks.mmmu import MMMU, MMMU_PRO, MMMU_PRO_VISION
from avar_lightning.benchmarks.mmstar import MMSTAR
from avar_lightning.rewards.answers import text_of

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        MATHVISTA,
        MATHVISION,
        MATHVERSE_VO,
        MMMU,
        MMMU_PRO,
        MMMU_PRO_VISION,
        MMSTAR,
        HALLUSIONBENCH,
    )
}


def benchmark_of(name: Any) -> Benchmark:
    """The benchmark of a name, as samples carry it in their column `benchmark`.

    Raises:
        ValueError: There is none of this name.

    >>> benchmark_of("mmstar").title
    'MMStar'
    """
    found = BENCHMARKS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"benchmark is {name!r}; expected one of {', '.join(BENCHMARKS)} "
            "(shards made by `avar convert --benchmark NAME` carry it in every sample)"
        )
    return found


def benchmark_reward(completions: Sequence[Any], *, benchmark: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 where a benchmark's own rules find the right answer, else 0.0: TRL's signature.

    Args:
        completions: Generated texts, or TRL's lists of messages.
        benchmark: The column of that name, one a completion.
        columns: The other columns of the samples, one value a completion each.

    Raises:
        ValueError: A benchmark is unknown, or columns have other lengths than the completions.

    >>> benchmark_reward(["<answer>B</answer>"], benchmark=["mmstar"], answer=["B"], options=[{"A": "1", "B": "2"}])
    [1.0]
    """
    if len(benchmark) != len(completions):
        raise ValueError(f"{len(completions)} completions came with {len(benchmark)} benchmarks; expected one each")
    rows = {name: values for name, values in columns.items() if _is_column(values, len(completions))}
    rewards = []
    for index, (completion, name) in enumerate(zip(completions, benchmark)):
        judged = benchmark_of(name)
        row = {key: values[index] for key, values in rows.items()}
        found = judged.extract(text_of(completion), row)
        rewards.append(float(found is not None and judged.score(found, row)))
    return rewards


def _is_column(values: Any, length: int) -> bool:
    """Trainers also pass what is no column: their state, for instance."""
    return isinstance(values, Sequence) and not isinstance(values, str | bytes) and len(values) == length
