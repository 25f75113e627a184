"""Seven benchmarks of multimodal reasoning: their files as shards, their scoring, results beside published ones."""

from avar_lightning.benchmarks.benchmark import Benchmark
from avar_lightning.benchmarks.converting import convert_benchmark
from avar_lightning.benchmarks.registry import BENCHMARKS, benchmark_of, benchmark_reward

__all__ = ["BENCHMARKS", "Benchmark", "benchmark_of", "benchmark_reward", "convert_benchmark"]
