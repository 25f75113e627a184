"""Attention of a vision-language model on groups of keys: measured exactly, next to any fused kernel."""

from avar_lightning.attention.interface import find_vlm, observe_attention
from avar_lightning.attention.mass import attention_mass, attention_received
from avar_lightning.attention.record import AttentionRecord

__all__ = ["AttentionRecord", "attention_mass", "attention_received", "find_vlm", "observe_attention"]
