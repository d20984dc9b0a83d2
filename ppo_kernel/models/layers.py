"""The parts of a decoder-only Transformer that look at one token at a time."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ..ops.masked import at_least_float32


class Linear(eqx.Module):
    """y = x W (+ b). `weight` is [in, out], the transpose of PyTorch's."""

    weight: Float[Array, "in out"]
    bias: Float[Array, " out"] | None = None

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        in_size: int,
        out_size: int,
        *,
        scale: float = 1.0,
        bias: bool = False,
    ) -> "Linear":
        """Normal weights of standard deviation scale / sqrt(in), zero bias. Consumes `key`."""
        weight = scale * in_size**-0.5 * jax.random.normal(key, (in_size, out_size))
        return cls(weight, jnp.zeros(out_size) if bias else None)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        # One matrix product over flattened rows: its weight gradient then contracts one axis,
        # which CPUs and GPUs do much faster than two.
        rows = x.reshape(-1, x.shape[-1]) @ self.weight.astype(x.dtype)
        if self.bias is not None:
            rows = rows + self.bias.astype(x.dtype)[None]
        return rows.reshape(*x.shape[:-1], -1)


class RMSNorm(eqx.Module):
    """y = w * x / sqrt(mean(x^2) + eps), in at least float32 (Zhang & Sennrich 2019, eq. 4)."""

    weight: Float[Array, " D"]
    epsilon: float = eqx.field(static=True, default=1e-6)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = at_least_float32(x)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        weight = self.weight.reshape((1,) * (x.ndim - 1) + (-1,))
        return weight.astype(x.dtype) * (wide * scale).astype(x.dtype)


class GatedMLP(eqx.Module):
    """y = (silu(x W_gate) * x W_up) W_down (Shazeer 2020, eq. 6)."""

    gate: Linear
    up: Linear
    down: Linear

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotate(
    x: Float[Array, "*batch X E"],
    positions: Int[Array, "*batch"],
    frequencies: Float[Array, " half"],
) -> Float[Array, "*batch X E"]:
    """Rotary position embedding with explicit positions, in the half-split layout.

        (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin),   angle = position * frequency

    Source: Su et al. 2021, eq. 34, with the pairing (i, i + E/2) that published checkpoints use.

    Args:
        x: queries or keys, any number of heads X.
        positions: of each token.
        frequencies: radians a position, E/2 of them.

    Returns:
        Same shape and type as `x`; the angles are in at least float32.
    """
    frequencies = at_least_float32(frequencies)
    angles = positions.astype(frequencies.dtype)[..., None, None] * frequencies.reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(at_least_float32(x), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
