"""A decoder-only Transformer: one trunk for policies, critics and reward models."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ..ops.checks import POSITIVE, Range, check_whole
from ..ops.dtypes import promote_types
from .attention import Attention
from .kernels.causal_attention import attend_causally, positions_of
from .kernels.rotary import Rotation, rotation_of
from .kernels.softmax_attention import KEPT
from .kernels.unstack import unstack
from .kv_cache import KVCache
from .linear import Linear
from .mlp import GatedMLP
from .norm import RMSNorm
from .protocol import Cache, DecodeStep


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies.

    Source: Grattafiori et al. 2024, sec. 3.2, https://arxiv.org/abs/2407.21783.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


TYPES = "float32", "bfloat16", "float16", "float64"

KEEP_PROJECTIONS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(KEPT),
)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and types of a trunk.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers: V, D, F and L.
        num_heads, num_kv_heads, head_dim: H, K (divides H) and E (even).
        rope_theta, rope_scaling: base of the rotary frequencies, and how they are stretched.
        norm_epsilon: added to the mean square in every norm.
        qkv_bias, qk_norm: whether query, key and value have a bias; query and key a norm.
        tie_embeddings: the output matrix is the embedding.
        max_positions: what a saved folder says; nothing here depends on it.
        param_dtype, compute_dtype, cache_dtype: of parameters, activations and the KV cache.
        remat: what a layer keeps for the backward pass, one of `jax.checkpoint_policies`. The
            default keeps the projections and the mixed values, and computes the rest again (norms,
            rotations, attention weights, activations): less to write and read back. None keeps
            everything, `nothing_saveable` only the layer's input.
        unroll: layers in one turn of the compiled loop. With more, programs take longer to compile
            and more memory, and small models less time to run. With all of them in one turn, the
            last layer leaves out what only slots before `start` need: see `Policy.hidden`.
        attention: what mixes the values of whole sequences, with the signature of the default:
            `attend_causally`, or `kernels.cudnn.cudnn_attention`.

    Raises:
        ValueError: sizes that do not fit each other, types that are none.
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
    attention: Callable = attend_causally

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "unroll"):
            check_whole(name, getattr(self, name))
        POSITIVE.check("rope_theta", self.rope_theta)
        Range(0).check("norm_epsilon", self.norm_epsilon)
        for name in ("param_dtype", "compute_dtype", "cache_dtype"):
            if getattr(self, name) not in TYPES:
                raise ValueError(f"{name} must be one of {TYPES}, got {getattr(self, name)!r}.")
        for name, optional in (("attention", False), ("remat", True)):
            function = getattr(self, name)
            if not callable(function) and not (function is None and optional):
                raise ValueError(f"{name} must be a function, got {function!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}.")

    def rope_frequencies(self) -> Float[np.ndarray, " half"]:
        """theta^(-2i/E) for i in [0, E/2), stretched by `rope_scaling`; radians a position."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        frequencies = self.rope_theta**-exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        turns = scaling.original_max_position * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / scaling.factor)


class Block(eqx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    @classmethod
    def init(cls, key: Key[Array, ""], config: TransformerConfig) -> "Block":
        """Variance 1 / inputs for every matrix, those into the residual stream 1 / (2 L) of it."""
        width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
        keys = jax.random.split(key, 7)
        narrow = (2 * config.num_layers) ** -0.5

        def norm(size: int) -> RMSNorm:
            return RMSNorm(jnp.ones(size), config.norm_epsilon)

        def into(index: int, size: int, bias: bool = False) -> Linear:
            return Linear.init(keys[index], width, size, bias=bias)

        attention = Attention(
            query=into(0, config.num_heads * head, config.qkv_bias),
            key=into(1, config.num_kv_heads * head, config.qkv_bias),
            value=into(2, config.num_kv_heads * head, config.qkv_bias),
            output=Linear.init(keys[3], config.num_heads * head, width, scale=narrow),
            query_norm=norm(head) if config.qk_norm else None,
            key_norm=norm(head) if config.qk_norm else None,
            num_kv_heads=config.num_kv_heads,
            head_dim=head,
        )
        down = Linear.init(keys[6], inner, width, scale=narrow)
        mlp = GatedMLP(gate=into(4, inner), up=into(5, inner), down=down)
        return cls(norm(width), attention, norm(width), mlp)


class Transformer(eqx.Module):
    """A decoder-only trunk, tokens -> hidden states.

    Attributes:
        embedding: one row a token id.
        blocks: every leaf has a leading axis of layers, which the forward pass scans.
        norm: of the last hidden states.
        config: sizes and types; static.
    """

    embedding: Float[Array, "V D"]
    blocks: Block
    norm: RMSNorm
    config: TransformerConfig = eqx.field(static=True)

    @classmethod
    def init(cls, key: Key[Array, ""], config: TransformerConfig) -> "Transformer":
        """Random weights of `config.param_dtype`; consumes `key`."""
        block_key, embedding_key = jax.random.split(key)
        blocks = jax.vmap(lambda k: Block.init(k, config))(
            jax.random.split(block_key, config.num_layers)
        )
        shape = (config.vocab_size, config.hidden_size)
        embedding = 0.02 * jax.random.normal(embedding_key, shape)
        model = cls(embedding, blocks, RMSNorm(jnp.ones(shape[1]), config.norm_epsilon), config)
        return cast_floating(model, config.param_dtype)

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int = 0
    ) -> Float[Array, "B rest D"]:
        """Final hidden states of slots `start` to S - 1, compute type."""
        return self._forward(tokens, mask, start)[0]

    def prefill(
        self, tokens: Int[Array, "N P"], mask: Bool[Array, "N P"], capacity: int
    ) -> tuple[Float[Array, "N D"], Cache]:
        """Hidden state of the last slot, and the cache; arguments as in `Policy`."""
        hidden, (keys, values) = self._forward(tokens, mask, tokens.shape[1] - 1)
        dtype = self.config.cache_dtype
        cache = KVCache.from_prefill(keys.astype(dtype), values.astype(dtype), mask, capacity)
        return hidden[:, 0], cache

    def decoder(self) -> DecodeStep:
        """The decode step, over layers taken apart once so that the loop copies no weights."""
        # Cast once: every use casts to the type of the activations.
        blocks = cast_floating(unstack(self.blocks), self.config.compute_dtype)
        layers = [(block, block.attention.decoder(), block.mlp.decoder()) for block in blocks]

        def step(tokens: Int[Array, " B"], cache: KVCache):
            x = self._embed(tokens)
            cache = cache.open_slot()
            rotation = self._rotation(cache.positions)
            keys, values = [], []
            for (block, attention, mlp), layer_keys, layer_values in zip(
                layers, cache.keys, cache.values, strict=True
            ):
                mixed, layer_keys, layer_values = attention(
                    block.attention_norm(x), rotation, layer_keys, layer_values,
                    cache.mask, cache.slot,
                )  # fmt: skip
                x = x + mixed
                x = x + mlp(block.mlp_norm(x))
                keys.append(layer_keys)
                values.append(layer_values)
            return self.norm(x), cache.close_slot(keys, values)

        return step

    def _forward(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int = 0):
        rotation = self._rotation(positions_of(mask))

        def apply(start: int, x: Float[Array, "B S D"], block: Block):
            normed = block.attention_norm(x)
            mixed, keys, values = block.attention(
                normed, mask, rotation, self.config.attention, start
            )
            x = x[:, start:] + mixed
            return x + block.mlp(block.mlp_norm(x)), (keys, values)

        def layer(start: int):
            step = partial(apply, start)
            if self.config.remat is None:
                return step
            # The turns of a scan are apart. Within one, XLA may merge what is computed again with
            # the first time and keep it: where memory matters, `unroll` stays at 1.
            return jax.checkpoint(step, policy=self.config.remat, prevent_cse=False)

        x, count, turn = self._embed(tokens), self.config.num_layers, self.config.unroll
        if start == 0 or turn < count:
            # All layers in the scan: to leave the last one out, it would have to copy the matrices
            # of the others out of their stack.
            x, cached = jax.lax.scan(layer(0), x, self.blocks, unroll=turn)
            return self.norm(x[:, start:]), cached
        # All but the last are one function, so that it is traced once.
        steps, cached = [layer(0)] * (count - 1) + [layer(start)], []
        for step, block in zip(steps, unstack(self.blocks), strict=True):
            x, keys_and_values = step(x, block)
            cached.append(keys_and_values)
        return self.norm(x), jax.tree.map(lambda *parts: jnp.stack(parts), *cached)

    def _embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        return self.embedding[tokens].astype(self.config.compute_dtype)

    def _rotation(self, positions: Int[Array, "*batch"]) -> Rotation:
        dtype = promote_types(self.config.compute_dtype, jnp.float32)
        return rotation_of(positions, jnp.asarray(self.config.rope_frequencies(), dtype))


def cast_floating(tree, dtype: str):
    """`tree` with its inexact arrays in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)
