"""Norms over the channels of each token."""

from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..ops.dtypes import upcast


class RMSNorm(eqx.Module):
    """y = (o + w) x / sqrt(mean(x^2) + epsilon), in at least float32.

    Source: Zhang & Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467. Gemma has the offset
    o = 1, others 0.
    """

    weight: Float[Array, " D"]
    epsilon: float = eqx.field(static=True, default=1e-6)
    offset: float = eqx.field(static=True, default=0.0)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = upcast(x)
        normed = wide * _inverse_root(wide, self.epsilon)
        weight = _as_row(self.weight, x)
        if self.offset:
            return ((self.offset + upcast(weight)) * normed).astype(x.dtype)
        # Published models without an offset round before they multiply.
        return weight.astype(x.dtype) * normed.astype(x.dtype)


class LayerNorm(eqx.Module):
    """y = (o + w) (x - mean(x)) / sqrt(var(x) + epsilon) + b, in at least float32.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """

    weight: Float[Array, " D"]
    bias: Float[Array, " D"] | None = None
    epsilon: float = eqx.field(static=True, default=1e-5)
    offset: float = eqx.field(static=True, default=0.0)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = upcast(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        weight = self.offset + _as_row(upcast(self.weight), x)
        scaled = weight * (centred * _inverse_root(centred, self.epsilon))
        if self.bias is not None:
            scaled = scaled + _as_row(upcast(self.bias), x)
        return scaled.astype(x.dtype)


Norm: TypeAlias = RMSNorm | LayerNorm


def _inverse_root(x: Float[Array, "*batch D"], epsilon: float) -> Float[Array, "*batch 1"]:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def _as_row(parameter: Float[Array, " D"], x: Float[Array, "*batch D"]) -> Float[Array, "*ones D"]:
    return parameter.reshape((1,) * (x.ndim - 1) + (-1,))
