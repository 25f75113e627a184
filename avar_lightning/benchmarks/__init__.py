"""Seven benchmarks of multimodal reasoning: their files as shards, their scoring, results beside published ones."""

from avar_lightning.benchmarks.benchmark import Benchmark

__all__ = ["Benchmark"]
