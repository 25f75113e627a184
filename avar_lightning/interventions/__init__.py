"""What steering does to a model: answers and attention on the same prompts, unsteered and steered.

A `Setting` is a named intervention; schedules make lists of them (a grid, one layer left out at a time, single heads,
random heads). `answer` runs one batch of prompts under one setting, `compare` puts two sets of answers side by side,
sample by sample, with a bootstrap interval. InterventionCallback and `avar sweep` are built on these.
"""

from avar_lightning.interventions.answering import METRICS, Reward, answer, columns_of, prompt_of
from avar_lightning.interventions.comparing import compare
from avar_lightning.interventions.settings import (
    UNSTEERED,
    Setting,
    grid,
    leave_one_layer_out,
    one_head_each,
    random_heads,
)
from avar_lightning.paired import Difference, mean, paired_difference

__all__ = [
    "METRICS",
    "UNSTEERED",
    "Difference",
    "Reward",
    "Setting",
    "answer",
    "columns_of",
    "compare",
    "grid",
    "leave_one_layer_out",
    "mean",
    "one_head_each",
    "paired_difference",
    "prompt_of",
    "random_heads",
]
