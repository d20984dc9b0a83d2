"""Llama 2 and 3: no biases; Llama 3.1 stretches the rotary frequencies (rope_type "llama3")."""

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, decoder_weights, read_common, require, write_common


def to_config(entries: Mapping[str, Any], **ours: Any) -> TransformerConfig:
    """config.json -> our settings. Raises ValueError for what is not supported."""
    require(entries, attention_bias=False, mlp_bias=False)
    return TransformerConfig(**read_common(entries, max_positions=2048), **ours)


def from_config(config: TransformerConfig) -> dict[str, Any]:
    """Our settings -> entries of config.json."""
    return write_common(config) | {"attention_bias": False, "mlp_bias": False}


LLAMA = Family(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    to_config=to_config,
    from_config=from_config,
    trunk_weights=decoder_weights,
)
