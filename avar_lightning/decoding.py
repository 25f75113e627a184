"""Plain greedy decoding, whatever a checkpoint's own generation settings ask for."""

from __future__ import annotations

from typing import Any

from avar_lightning.families import placeholder_ids
from avar_lightning.model import end_ids
from avar_lightning.processing import padding_id

# What `generate` takes from the checkpoint's generation_config.json unless it is told otherwise. Qwen2.5-VL's asks for
# a repetition penalty of 1.05, which changes greedy answers too.
_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
}


def greedy(model: Any, processor: Any, *, max_new_tokens: int, repetition_penalty: float = 1.0) -> dict[str, Any]:
    """Arguments for a model's `generate`: the likeliest token each time, and never an image placeholder.

    Args:
        model: A Hugging Face VLM, PEFT-wrapped or not, on weights that are whole.
        processor: Its processor or tokenizer.
        max_new_tokens: Longest answer.
        repetition_penalty: Divides the logits of tokens that are there already (Keskar et al., arXiv 1909.05858);
            1 changes nothing.
    """
    return _NEUTRAL | {
        "max_new_tokens": max_new_tokens,
        "repetition_penalty": repetition_penalty,
        "suppress_tokens": placeholder_ids(model.config),
        "pad_token_id": padding_id(processor),
        "eos_token_id": end_ids(model, processor),
        "synced_gpus": False,
    }
