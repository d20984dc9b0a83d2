"""Norms over the channels of each token."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..ops.dtypes import upcast


class RMSNorm(eqx.Module):
    """y = w x / sqrt(mean(x^2) + epsilon), in at least float32.

    Source: Zhang & Sennrich 2019, eq. 4 (https://arxiv.org/abs/1910.07467).
    """

    weight: Float[Array, " D"]
    epsilon: float = eqx.field(static=True, default=1e-6)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = upcast(x)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        weight = self.weight.reshape((1,) * (x.ndim - 1) + (-1,))
        return weight.astype(x.dtype) * (wide * scale).astype(x.dtype)
