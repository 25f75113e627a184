"""Visual-anchored reflection data (VARD) from models that are served elsewhere."""

from avar_lightning.synthesis.config import DemoConfig, StageConfig, StagesConfig, SynthesisConfig
from avar_lightning.synthesis.filters import FilterConfig
from avar_lightning.synthesis.pipeline import preview, synthesize
from avar_lightning.synthesis.report import SynthesisReport

__all__ = [
    "DemoConfig",
    "FilterConfig",
    "StageConfig",
    "StagesConfig",
    "SynthesisConfig",
    "SynthesisReport",
    "preview",
    "synthesize",
]
