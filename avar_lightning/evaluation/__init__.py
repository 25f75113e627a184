"""Answers to benchmarks: kept as they come, judged by each benchmark's rules, and summed up beside published results.

BenchmarkCallback makes the answers; everything here takes plain rows and writes plain files.
"""

from avar_lightning.evaluation.answers import AnswerFile, open_folder, read_answers
from avar_lightning.evaluation.identity import about_model
from avar_lightning.evaluation.intervals import Interval, bootstrap, bootstrap_mean
from avar_lightning.evaluation.judge import Judge
from avar_lightning.evaluation.judge_config import JudgeConfig
from avar_lightning.evaluation.results import evaluate, write_results
from avar_lightning.evaluation.verdicts import ask_judge, by_rules, judge_again

__all__ = [
    "AnswerFile",
    "Interval",
    "Judge",
    "JudgeConfig",
    "about_model",
    "ask_judge",
    "bootstrap",
    "bootstrap_mean",
    "by_rules",
    "evaluate",
    "judge_again",
    "open_folder",
    "read_answers",
    "write_results",
]
