"""Lightning callbacks that measure visual attention in any project; import as `avar_lightning.callbacks`."""

from avar_lightning.callbacks.intervention import InterventionCallback
from avar_lightning.callbacks.vas import VASCallback

__all__ = ["InterventionCallback", "VASCallback"]
