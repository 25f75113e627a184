"""Models in Hugging Face format, from any checkpoint."""

from avar_lightning.export.card import model_card
from avar_lightning.export.exporting import ExportConfig, Exported, export
from avar_lightning.export.folder import write_folder

__all__ = ["ExportConfig", "Exported", "export", "model_card", "write_folder"]
