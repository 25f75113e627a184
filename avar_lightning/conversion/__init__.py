"""Other data formats into shards, and the check of a set of shards."""

from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.pipeline import ConversionReport, Reading, convert
from avar_lightning.conversion.validating import ValidationReport, validate

__all__ = ["ConversionReport", "ConvertConfig", "Reading", "ValidationReport", "convert", "validate"]
