"""One layer: attention and an MLP, each added to a residual stream."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .attention import Attention, Mix
from .config import TransformerConfig
from .kernels.rotary import Rotation
from .linear import Linear, decoding
from .mlp import MLP
from .norm import LayerNorm, Norm, RMSNorm


class Block(eqx.Module):
    """A layer, n the norms before and p the norms after, each the identity where there is none.

        m = x + p(attention(n(x))),   y = m + p(mlp(n(m)))

    Or in parallel, with one norm before both (Chowdhery et al. 2022, sec. 2,
    https://arxiv.org/abs/2204.02311):

        y = x + p(attention(n(x))) + p(mlp(n(x)))
    """

    attention_norm: Norm | None
    attention: Attention
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: MLP
    mlp_post_norm: Norm | None
    parallel: bool = eqx.field(static=True)

    @classmethod
    def init(cls, key: Key[Array, ""], config: TransformerConfig) -> "Block":
        """Variance 1 / inputs for every matrix, those into the residual stream 1 / (2 L) of it."""
        keys, width = jax.random.split(key, 7), config.hidden_size
        before, after = config.pre_norms, config.post_norms
        return cls(
            attention_norm=init_norm(config, width) if before else None,
            attention=_init_attention(keys[:4], config),
            attention_post_norm=init_norm(config, width) if after else None,
            mlp_norm=init_norm(config, width) if before and not config.parallel else None,
            mlp=_init_mlp(keys[4:], config),
            mlp_post_norm=init_norm(config, width) if after else None,
            parallel=config.parallel,
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotation: Rotation | None,
        mix: Mix,
        start: int = 0,
    ) -> tuple[Float[Array, "B rest D"], Any]:
        """The layer's results from slot `start` on, and what `mix` gives for a cache."""
        return self._equation(self.attention, self.mlp, x, rotation, mix, start)

    def decoder(self):
        """The same for one token per row; called once, outside the loop."""
        attention, mlp = self.attention.by(decoding), self.mlp.by(decoding)
        return partial(self._equation, attention, mlp)

    def _equation(self, attention, mlp, x, rotation, mix, start=0):
        normed = _normed(self.attention_norm, x)
        mixed, cached = attention(normed, rotation, mix)
        mixed = _normed(self.attention_post_norm, mixed)
        if start:
            x, normed = x[:, start:], normed[:, start:]
        middle = x + mixed
        if not self.parallel:
            normed = _normed(self.mlp_norm, middle)
        return middle + _normed(self.mlp_post_norm, mlp(normed)), cached


def init_norm(config: TransformerConfig, size: int) -> Norm:
    """The norm of `config`, which at first only normalizes."""
    weight = jnp.full(size, 1.0 - config.norm_offset)
    if config.norm is RMSNorm:
        return RMSNorm(weight, config.norm_epsilon, config.norm_offset)
    bias = jnp.zeros(size) if config.norm_bias else None
    return LayerNorm(weight, bias, config.norm_epsilon, config.norm_offset)


def _normed(norm: Norm | None, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    return x if norm is None else norm(x)


def _init_attention(keys: Key[Array, "4"], config: TransformerConfig) -> Attention:
    width, head = config.hidden_size, config.head_dim
    queries, heads, bias = config.num_heads * head, config.num_kv_heads * head, config.qkv_bias
    return Attention(
        query=Linear.init(keys[0], width, queries, bias=bias, axes=("embed", "heads")),
        key=Linear.init(keys[1], width, heads, bias=bias, axes=("embed", "kv_heads")),
        value=Linear.init(keys[2], width, heads, bias=bias, axes=("embed", "kv_heads")),
        output=Linear.init(
            keys[3], queries, width, scale=_residual_scale(config), bias=config.output_bias,
            axes=("heads", "embed"),
        ),
        query_norm=init_norm(config, head) if config.qk_norm else None,
        key_norm=init_norm(config, head) if config.qk_norm else None,
        num_kv_heads=config.num_kv_heads,
        head_dim=head,
    )  # fmt: skip


def _init_mlp(keys: Key[Array, "3"], config: TransformerConfig) -> MLP:
    width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    into = partial(Linear.init, in_size=width, out_size=inner, bias=bias, axes=("embed", "mlp"))
    return MLP(
        gate=into(keys[0]) if config.gated else None,
        up=into(keys[1]),
        down=Linear.init(
            keys[2], inner, width, scale=_residual_scale(config), bias=bias, axes=("mlp", "embed")
        ),
        activation=config.activation,
    )


def _residual_scale(config: TransformerConfig) -> float:
    return (2 * config.num_layers) ** -0.5
