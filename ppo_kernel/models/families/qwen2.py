"""Qwen 2 and 2.5: biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, decoder_weights, read_common, write_common


def to_config(entries: Mapping[str, Any], **ours: Any) -> TransformerConfig:
    """config.json -> our settings. Raises ValueError for what is not supported."""
    common = read_common(entries, max_positions=32_768)
    return TransformerConfig(**common, qkv_bias=True, **ours)


def from_config(config: TransformerConfig) -> dict[str, Any]:
    """Our settings -> entries of config.json."""
    return write_common(config) | {"use_sliding_window": False}


QWEN2 = Family(
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    to_config=to_config,
    from_config=from_config,
    trunk_weights=decoder_weights,
)
