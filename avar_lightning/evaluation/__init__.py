"""Answers to benchmarks: kept as they come, judged by each benchmark's rules, and summed up beside published results.

BenchmarkCallback makes the answers; everything here takes plain rows and writes plain files.
"""

from avar_lightning.evaluation.answers import open_folder, read_about, read_answers, renew_columns
from avar_lightning.evaluation.book import AnswerBook
from avar_lightning.evaluation.identity import about_model, about_shards
from avar_lightning.evaluation.intervals import Interval, bootstrap, bootstrap_mean
from avar_lightning.evaluation.judge import Judge
from avar_lightning.evaluation.judge_config import JudgeConfig
from avar_lightning.evaluation.results import evaluate, scalars, write_results
from avar_lightning.evaluation.verdicts import ask_judge, by_rules, judge_again

__all__ = [
    "AnswerBook",
    "Interval",
    "Judge",
    "JudgeConfig",
    "about_model",
    "about_shards",
    "ask_judge",
    "bootstrap",
    "bootstrap_mean",
    "by_rules",
    "evaluate",
    "judge_again",
    "open_folder",
    "read_about",
    "read_answers",
    "renew_columns",
    "scalars",
    "write_results",
]
