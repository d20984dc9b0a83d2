"""Qwen 3, dense: norms on queries and keys, no biases, heads of 128 unless it says otherwise."""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, decoder_weights, read_common, require, write_common


def to_config(entries: Mapping[str, Any], **ours: Any) -> TransformerConfig:
    """config.json -> our settings. Raises ValueError for what is not supported."""
    require(entries, attention_bias=False)
    common = read_common(entries, max_positions=32_768, head_dim=128)
    return TransformerConfig(**common, qk_norm=True, **ours)


def from_config(config: TransformerConfig) -> dict[str, Any]:
    """Our settings -> entries of config.json."""
    return write_common(config) | {"attention_bias": False, "use_sliding_window": False}


QWEN3 = Family(
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    to_config=to_config,
    from_config=from_config,
    trunk_weights=decoder_weights,
)
