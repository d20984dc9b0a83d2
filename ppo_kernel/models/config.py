"""Sizes and settings of a Transformer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float

from ..ops.checks import POSITIVE, Range, check_whole
from .kernels.causal_attention import attend_causally
from .kernels.glu import Activation
from .kernels.softmax_attention import KEPT
from .norm import LayerNorm, RMSNorm
from .rotary import Rope, RopeScaling

TYPES = "float32", "bfloat16", "float16", "float64"

KEEP_PROJECTIONS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(KEPT),
)


@runtime_checkable
class AttentionFunction(Protocol):
    """Causal attention over whole sequences: `attend_causally`, or another with its arguments."""

    def __call__(
        self,
        query: Float[Array, "B K group S E"],
        key: Float[Array, "B K S E"],
        value: Float[Array, "B K S E"],
        mask: Bool[Array, "B S"],
        *,
        scale: float | None,
        softcap: float | None,
        window: int | None,
    ) -> Float[Array, "B K group S E"]: ...


@dataclass(frozen=True)
class LayerSpec:
    """Settings in which the layers of a model may differ.

    Attributes:
        rope: the rotary embedding of queries and keys; None for none.
        window: a token sees this many tokens, itself the last; None for all before it.
        softcap: c: logits of the attention become c tanh(logits / c); None for no cap.
        scale: of those logits; None for 1 / sqrt(E).

    Raises:
        ValueError: a number out of its range.
    """

    rope: Rope | None = Rope()
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self):
        check_whole("window", self.window, optional=True)
        for name, value in (("softcap", self.softcap), ("scale", self.scale)):
            if value is not None:
                POSITIVE.check(name, value)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes, settings and types of a trunk.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers: V, D, F and L.
        num_heads, num_kv_heads, head_dim: H, K (divides H) and E.
        rope_theta, rope_scaling: of every layer's `Rope`, where `layers` is empty.
        layers: one period of layers, repeated until there are `num_layers`; the last period may
            stop early. Empty for equal layers.
        norm: `RMSNorm` or `LayerNorm`, of every norm.
        norm_epsilon, norm_offset, norm_bias: see those classes; only a LayerNorm has a bias.
        pre_norms, post_norms: whether attention and MLP have a norm before them, and after them.
        parallel: attention and MLP both read the layer's input, by one norm: see `Block`.
        qkv_bias, output_bias, mlp_bias: whether query, key and value have a bias; the output of
            attention; the matrices of the MLP.
        qk_norm: whether query and key have a norm, over each head.
        gated, activation: whether the MLP has a gate, and its function of each element.
        embedding_scale: factor of the embeddings; None for 1.
        learned_positions: positions are a table with `max_positions` rows. Layers then have no
            rotary embedding, unless `layers` names one.
        final_softcap: c: the model's logits become c tanh(logits / c); None for no cap.
        tie_embeddings: the output matrix is the embedding.
        max_positions: for a saved folder, and the table of learned positions.
        param_dtype, compute_dtype, cache_dtype: of parameters, activations and the KV cache.
        remat: what a layer keeps for the backward pass, one of `jax.checkpoint_policies`. The
            default keeps the projections and the mixed values, and computes the rest again (norms,
            rotations, attention weights, activations): less to write and read back. None keeps
            everything, `nothing_saveable` only the layer's input.
        unroll: layers per scan step, in whole periods. Larger: slower to compile, more memory,
            faster for small models. With all layers in one step, the last one computes the slots
            before `start` only as far as their keys and values.
        attention: computes attention over whole sequences: `attend_causally`, or
            `kernels.cudnn.cudnn_attention`.

    Raises:
        ValueError: sizes or settings that do not fit each other, types that are none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    max_positions: int = 2048
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    cache_dtype: str = "float32"
    remat: Callable | None = KEEP_PROJECTIONS
    unroll: int = 1
    attention: AttentionFunction = attend_causally
    layers: tuple[LayerSpec, ...] = ()
    norm: type[RMSNorm] | type[LayerNorm] = RMSNorm
    norm_offset: float = 0.0
    norm_bias: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: Activation = jax.nn.silu
    embedding_scale: float | None = None
    learned_positions: bool = False
    final_softcap: float | None = None

    def __post_init__(self):
        values = vars(self)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "unroll", "max_positions"):
            check_whole(name, values[name])
        POSITIVE.check("rope_theta", self.rope_theta)
        Range(0).check("norm_epsilon", self.norm_epsilon)
        for name in ("embedding_scale", "final_softcap"):
            if values[name] is not None:
                POSITIVE.check(name, values[name])
        for name in ("param_dtype", "compute_dtype", "cache_dtype"):
            if values[name] not in TYPES:
                raise ValueError(f"{name} must be one of {TYPES}, got {values[name]!r}.")
        for name, optional in (("attention", False), ("activation", False), ("remat", True)):
            function = values[name]
            if not callable(function) and not (function is None and optional):
                raise ValueError(f"{name} must be a function, got {function!r}.")
        _check_together(self)

    @property
    def period(self) -> tuple[LayerSpec, ...]:
        """The layers of one period."""
        if self.layers:
            return self.layers
        rope = None if self.learned_positions else Rope(self.rope_theta, self.rope_scaling)
        return (LayerSpec(rope=rope),)

    def spec_of(self, layer: int) -> LayerSpec:
        """The settings of one layer, counted from 0."""
        return self.period[layer % len(self.period)]


def _check_together(config: TransformerConfig) -> None:
    """Refuse settings that do not fit each other."""
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}."
        )
    for spec in config.period:
        width = config.head_dim if spec.rope is None else spec.rope.width(config.head_dim)
        if spec.rope is not None and (width % 2 or not width):
            raise ValueError(
                f"head_dim must be even for rotary embeddings, got {config.head_dim} with "
                f"{width} channels to rotate."
            )
    if config.layers and (config.rope_theta, config.rope_scaling) != (10_000.0, None):
        raise ValueError(
            "layers says what each layer's rotary embedding is, so rope_theta and rope_scaling "
            f"have no meaning beside it; got {config.rope_theta} and {config.rope_scaling}."
        )
    if config.norm is RMSNorm and config.norm_bias:
        raise ValueError("norm_bias=True needs norm=LayerNorm: an RMSNorm has no bias.")
    if not (config.pre_norms or config.post_norms):
        raise ValueError("pre_norms and post_norms are both False: a layer needs one of them.")
    if config.parallel and not config.pre_norms:
        raise ValueError("parallel=True needs pre_norms: attention and MLP read one norm.")
