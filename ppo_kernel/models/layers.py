"""The parts of a decoder-only Transformer that look at one token at a time."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
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


def for_few_rows(*layers: Linear) -> Callable[[Float[Array, "B in"]], tuple[Array, ...]]:
    """Layers of one input as one product, its matrix laid out once for many decode steps.

    Small ones stay as they are: their weights lie in a cache from one step to the next, where
    every form is as fast.
    """
    if sum(layer.weight.size for layer in layers) < _LARGE:
        return lambda x: tuple(layer(x) for layer in layers)
    # The barrier keeps XLA from undoing the layout inside the loop.
    weight = jax.lax.optimization_barrier(jnp.concatenate([x.weight.T for x in layers]))
    ends = np.cumsum([x.weight.shape[1] for x in layers])[:-1]

    def apply(x: Float[Array, "B in"]) -> tuple[Array, ...]:
        parts = jnp.split(times_transposed(x, weight.astype(x.dtype)), ends, axis=1)
        biases = [layer.bias for layer in layers]
        return tuple(
            part if bias is None else part + bias.astype(x.dtype)[None]
            for part, bias in zip(parts, biases, strict=True)
        )

    return apply


def times_transposed(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """x W^T, in the form that reads W fastest where there are few rows.

    XLA's product on CPUs reads its right operand slowly, as if it were packed anew in every call.
    With W on the left it takes up to a third less time; between six and fifteen rows a sum of
    products is mostly faster still (bench/RESULTS.md). Other devices, other types and more rows get
    the plain product.
    """

    def plain(x, weight):
        return x @ weight.T

    def unpacked(x, weight):
        if 6 <= x.shape[0] <= 15:
            return jnp.sum(weight[:, None] * x[None], axis=-1).T
        # Without the barrier XLA would turn the operands around again.
        return jax.lax.optimization_barrier(jnp.einsum("oi,bi->ob", weight, x)).T

    if x.shape[0] > 64 or x.dtype != jnp.float32:
        return plain(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=unpacked, default=plain)


_LARGE = 2**18
"""Weights: 1 MB in float32, about what a core's own cache holds."""


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

    def decoder(self) -> Callable[[Float[Array, "B D"]], Float[Array, "B D"]]:
        """The same for the few rows of a decode step; asked for once, outside the loop."""
        gate_and_up, down = for_few_rows(self.gate, self.up), for_few_rows(self.down)

        @jax.named_scope("mlp")
        def apply(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
            gate, up = gate_and_up(x)
            return down(jax.nn.silu(gate) * up)[0]

        return apply


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
