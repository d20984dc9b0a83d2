"""What ties a family of published checkpoints to our `Transformer`: settings and weight names.

A family is one file with a `Family` in it (see `llama.py`) and one entry of `FAMILIES`. The
functions here are what such files share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from ..config import TransformerConfig
from ..rotary import RopeScaling


@dataclass(frozen=True)
class Weight:
    """Where a tensor of a checkpoint lives in our models.

    Attributes:
        name: the checkpoint's, with "{layer}" in it where ours are stacked over layers.
        path: dotted attributes from our model to the array.
        layout: how the checkpoint keeps one layer of it: the same; transposed (PyTorch's
            linear layers are [out, in]); or our vector as one row [1, D].
    """

    name: str
    path: str
    layout: Literal["same", "transposed", "row"] = "same"

    @property
    def stacked(self) -> bool:
        """Whether our array has a leading axis of layers."""
        return "{layer}" in self.name

    def find(self, model: Any) -> Any:
        """The leaf of `model`."""
        return attrgetter(self.path)(model)

    def to_checkpoint(self, x: np.ndarray) -> np.ndarray:
        """The array of one of our layers, as the checkpoint keeps it; a view."""
        return {"same": x, "transposed": x.T, "row": x[None]}[self.layout]

    def from_checkpoint(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `to_checkpoint`."""
        return {"same": x, "transposed": x.T, "row": x[0]}[self.layout]

    def checkpoint_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor, given that of our (stacked) array."""
        layer = shape[1:] if self.stacked else shape
        return self.to_checkpoint(np.broadcast_to(np.zeros(()), layer)).shape


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint, as `model_type` in its config.json names it.

    Attributes:
        model_type: the name.
        causal_lm, classifier: names of its two architectures in transformers.
        to_config: (config.json, **ours) -> our settings; raises ValueError for what we cannot
            represent. `ours` are those of `TransformerConfig` that no checkpoint decides: types,
            and how the program is compiled.
        from_config: our settings -> the entries of config.json that they decide.
        trunk_weights: our settings -> the tensors of the trunk, in paths of a model with a `trunk`.
    """

    model_type: str
    causal_lm: str
    classifier: str
    to_config: Callable[..., TransformerConfig]
    from_config: Callable[[TransformerConfig], dict[str, Any]]
    trunk_weights: Callable[[TransformerConfig], tuple[Weight, ...]]

    def causal_lm_weights(self, config: TransformerConfig) -> tuple[Weight, ...]:
        """The tensors of a `LanguageModel`."""
        head = () if config.tie_embeddings else (Weight("lm_head.weight", "output"),)
        return (*self.trunk_weights(config), *head)

    def classifier_weights(self, config: TransformerConfig) -> tuple[Weight, ...]:
        """The tensors of a `ValueModel`: a classifier with one label and no bias."""
        return (*self.trunk_weights(config), Weight("score.weight", "head.weight", "row"))

    def describe(self, config: TransformerConfig) -> dict[str, Any]:
        """`from_config`, sure to mean the same when it is read again.

        Raises:
            ValueError: the family cannot express `config`; names the fields.
        """
        entries = self.from_config(config)
        own = {name: vars(config)[name] for name in _OURS}
        ours, back = vars(config), vars(self.to_config(entries, **own))
        lost = [f"{name}={ours[name]!r}" for name in ours if ours[name] != back[name]]
        if lost:
            raise ValueError(
                f"a checkpoint of family {self.model_type!r} cannot express {', '.join(lost)}; "
                "choose another family or other settings."
            )
        return entries


_OURS = ("param_dtype", "compute_dtype", "cache_dtype", "remat", "unroll", "attention")

_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

_REMEDIES = {
    "hidden_act": "this family is read with 'silu' alone; a family whose `to_config` sets another "
    "`activation` is one more file in models/families",
    "quantization_config": "dequantize the checkpoint with transformers and save it again",
    "use_sliding_window": "this family is read with full attention alone; set it to false if no "
    "sequence will be longer than the window",
    "partial_rotary_factor": "this family is read with full rotary embeddings alone",
    "attention_bias": "this family is read without biases of this kind",
    "mlp_bias": "this family is read without biases of this kind",
}


def require(entries: Mapping[str, Any], **supported: Any) -> None:
    """Check entries of config.json that have one supported value; missing or null is fine.

    Raises:
        ValueError: another value; names the key, both values and a remedy.
    """
    for key, value in supported.items():
        found = entries.get(key)
        if found is not None and found != value:
            raise ValueError(
                f"{key}={found!r} in config.json is not supported (only {value!r} is): "
                f"{_REMEDIES[key]}."
            )


def read_common(
    entries: Mapping[str, Any], *, max_positions: int, head_dim: int | None = None
) -> dict[str, Any]:
    """The arguments of `TransformerConfig` that all families keep under the same keys.

    Args:
        entries: config.json, as transformers 4 or 5 writes it.
        max_positions, head_dim: the family's defaults; None means width over heads.

    Raises:
        ValueError: a size is missing, or a setting is not supported.
    """
    require(entries, hidden_act="silu", quantization_config=None, use_sliding_window=False)
    kinds = set(entries.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"layer_types with {sorted(kinds)} in config.json is not supported: this family is "
            "read with 'full_attention' alone."
        )
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
    }
    missing = [key for key in names.values() if entries.get(key) is None]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}: is it that of a model?")
    sizes = {ours: entries[theirs] for ours, theirs in names.items()}
    head_dim = _value(entries, "head_dim", head_dim)
    theta, scaling = _read_rope(entries)
    return sizes | {
        "num_kv_heads": _value(entries, "num_key_value_heads", sizes["num_heads"]),
        "head_dim": sizes["hidden_size"] // sizes["num_heads"] if head_dim is None else head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_epsilon": float(_value(entries, "rms_norm_eps", 1e-6)),
        "tie_embeddings": _value(entries, "tie_word_embeddings", False),
        "max_positions": _value(entries, "max_position_embeddings", max_positions),
    }


def write_common(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_common`, in the spellings of transformers 4 and of 5 side by side."""
    scaling = config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        values = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
        values = (*values, scaling.original_max_position)
        rope = {"rope_type": "llama3", **dict(zip(_ROPE_KEYS, values, strict=True))}
    theta = {"rope_theta": config.rope_theta}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": theta | (rope or {"rope_type": "default"}),
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
    }


def decoder_weights(config: TransformerConfig) -> tuple[Weight, ...]:
    """The tensors of a trunk, named as Llama does and most families after it."""
    linear = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    vectors = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
    }
    if config.qkv_bias:
        vectors |= {f"{name}.bias": f"{path}.bias" for name, path in list(linear.items())[:3]}
    if config.qk_norm:
        vectors["self_attn.q_norm.weight"] = "attention.query_norm.weight"
        vectors["self_attn.k_norm.weight"] = "attention.key_norm.weight"
    name, path = "model.layers.{layer}.", "trunk.blocks."
    return (
        Weight("model.embed_tokens.weight", "trunk.embedding"),
        *(
            Weight(f"{name}{theirs}.weight", f"{path}{ours}.weight", "transposed")
            for theirs, ours in linear.items()
        ),
        *(Weight(name + theirs, path + ours) for theirs, ours in vectors.items()),
        Weight("model.norm.weight", "trunk.norm.weight"),
    )


def _read_rope(entries: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`."""
    rope = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    theta = float(_value(rope, "rope_theta", _value(entries, "rope_theta", 10_000.0)))
    require({**entries, **rope}, partial_rotary_factor=1.0)
    kind = _value(rope, "rope_type", _value(rope, "type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()):
        kind = "one per kind of layer"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"rope_type={kind!r} in config.json is not supported: 'default' and 'llama3' are. If "
            "your sequences fit the length that the model was first trained on, setting it to "
            "'default' may do."
        )
    missing = [key for key in _ROPE_KEYS if rope.get(key) is None]
    if missing:
        raise ValueError(f"config.json has rope_type='llama3' without {', '.join(missing)}.")
    factor, low, high, length = (rope[key] for key in _ROPE_KEYS)
    return theta, RopeScaling(float(factor), float(low), float(high), int(length))


def _value(entries: Mapping[str, Any], key: str, default: Any) -> Any:
    """An entry; the default stands in for a missing one and for null, not for 0 or false."""
    found = entries.get(key)
    return default if found is None else found
