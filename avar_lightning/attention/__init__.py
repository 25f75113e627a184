"""Attention of a vision-language model on groups of keys: measured and steered exactly, next to any fused kernel."""

from avar_lightning.attention.decoder import LayerSpec, attention_layers, find_vlm, select_layers
from avar_lightning.attention.interface import observe_attention, steer_attention
from avar_lightning.attention.mass import attention_mass, attention_received
from avar_lightning.attention.record import AttentionRecord
from avar_lightning.attention.steering import MODES, Intervention

__all__ = [
    "MODES",
    "AttentionRecord",
    "Intervention",
    "LayerSpec",
    "attention_layers",
    "attention_mass",
    "attention_received",
    "find_vlm",
    "observe_attention",
    "select_layers",
    "steer_attention",
]
