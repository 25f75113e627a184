"""Lightning callbacks that measure visual attention in any project; import as `avar_lightning.callbacks`."""

from avar_lightning.callbacks.benchmark import BenchmarkCallback
from avar_lightning.callbacks.checkpoint import Checkpoint
from avar_lightning.callbacks.completions import CompletionsCallback
from avar_lightning.callbacks.guidance_controller import GuidanceController
from avar_lightning.callbacks.intervention import InterventionCallback
from avar_lightning.callbacks.vas import VASCallback

__all__ = [
    "BenchmarkCallback",
    "Checkpoint",
    "CompletionsCallback",
    "GuidanceController",
    "InterventionCallback",
    "VASCallback",
]
