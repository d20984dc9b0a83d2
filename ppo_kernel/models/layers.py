"""The parts of a decoder-only Transformer that look at one token at a time."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ..ops.dtypes import upcast
from .kernels.decode_matmul import LARGE, LaidOut


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
        rows = product(x.reshape(-1, x.shape[-1]), self.weight.astype(x.dtype))
        if self.bias is not None:
            rows = rows + self.bias.astype(x.dtype)[None]
        return rows.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def product(x: Float[Array, "rows in"], weight: Float[Array, "in out"]) -> Float[Array, "rows out"]:
    """x W, whose weight gradient has its longer side last: x^T dy, or (dy^T x)^T.

    XLA's CPU backend computes a product of few columns and many terms at half its usual speed
    (bench/TRIED.md). Forward-mode derivatives alone do not exist.
    """
    return x @ weight


def _product_forward(x, weight):
    return x @ weight, (x, weight)


def _product_backward(residuals, gradient):
    x, weight = residuals

    def plain(x, gradient):
        return x.T @ gradient

    def turned(x, gradient):
        # Without the barrier XLA would turn it back.
        return jax.lax.optimization_barrier(gradient.T @ x).T

    if gradient.shape[1] >= min(x.shape[1], _MANY_COLUMNS):
        weight_gradient = plain(x, gradient)
    else:
        weight_gradient = jax.lax.platform_dependent(x, gradient, cpu=turned, default=plain)
    return gradient @ weight.T, weight_gradient


product.defvjp(_product_forward, _product_backward)

_MANY_COLUMNS = 512
"""Columns of a product: from here on more do not make it faster."""


def side_by_side(x: Float[Array, "*batch in"], layers: tuple[Linear, ...]) -> tuple[Array, ...]:
    """What each of these layers makes of `x`, by one product.

    One product of many columns is faster than several of few, and so are its gradients.
    """
    weight = jnp.concatenate([layer.weight for layer in layers], axis=1)
    return _parts(Linear(weight)(x), layers)


def _parts(joint: Float[Array, "*batch outs"], layers: tuple[Linear, ...]) -> tuple[Array, ...]:
    """The columns of each layer in their joint product, with its bias."""
    ends = np.cumsum([layer.weight.shape[1] for layer in layers])[:-1]
    parts = jnp.split(joint, ends, axis=-1)
    biases = [layer.bias for layer in layers]
    return tuple(
        part if bias is None else part + jnp.broadcast_to(bias.astype(part.dtype), part.shape)
        for part, bias in zip(parts, biases, strict=True)
    )


def for_few_rows(*layers: Linear) -> Callable[[Float[Array, "B in"]], tuple[Array, ...]]:
    """Layers of one input as one product, its matrix laid out once for many decode steps.

    Small ones stay as they are: their weights lie in a cache from one step to the next, where
    every form is as fast.
    """
    if sum(layer.weight.size for layer in layers) < LARGE:
        return lambda x: tuple(layer(x) for layer in layers)
    joint = LaidOut.of(jnp.concatenate([layer.weight.T for layer in layers]))
    return lambda x: _parts(joint(x), layers)


class RMSNorm(eqx.Module):
    """y = w * x / sqrt(mean(x^2) + eps), in at least float32.

    Source: Zhang & Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467.
    """

    weight: Float[Array, " D"]
    epsilon: float = eqx.field(static=True, default=1e-6)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = upcast(x)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        weight = self.weight.reshape((1,) * (x.ndim - 1) + (-1,))
        return weight.astype(x.dtype) * (wide * scale).astype(x.dtype)


class GatedMLP(eqx.Module):
    """y = (silu(x W_gate) * x W_up) W_down.

    Source: Shazeer 2020, eq. 6, https://arxiv.org/abs/2002.05202.
    """

    gate: Linear
    up: Linear
    down: Linear

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(gated(self.gate(x), self.up(x)))

    def decoder(self) -> Callable[[Float[Array, "B D"]], Float[Array, "B D"]]:
        """The same for the few rows of a decode step; asked for once, outside the loop."""
        gate_and_up, down = for_few_rows(self.gate, self.up), for_few_rows(self.down)

        @jax.named_scope("mlp")
        def apply(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
            gate, up = gate_and_up(x)
            return down(jax.nn.silu(gate) * up)[0]

        return apply


@jax.custom_vjp
def gated(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """silu(gate) * up, whose gradient reads `gate` and `up` alone.

        s = sigmoid(g),   dg = dy u s (1 + g (1 - s)),   du = dy g s

    XLA's CPU backend would keep s as one more array, to be written once and read three times, where
    computing it again costs less. Forward-mode derivatives alone do not exist.
    """
    return jax.nn.silu(gate) * up


def _gated_forward(gate, up):
    return jax.nn.silu(gate) * up, (gate, up)


def _gated_backward(residuals, gradient):
    gate, up = residuals
    gate = _anew(gate)
    s = jax.nn.sigmoid(gate)
    gate_gradient = gradient * up * s * (1.0 + gate * (1.0 - s))
    return gate_gradient, gradient * jax.nn.silu(_anew(gate))


gated.defvjp(_gated_forward, _gated_backward)


def _anew(x: Array) -> Array:
    """`x`, with what is computed from it computed again, on CPUs."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


Rotation: TypeAlias = tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]
"""Cosines and sines of the angles by which the tokens of a batch are turned."""


def rotation_of(positions: Int[Array, "*batch"], frequencies: Float[Array, " half"]) -> Rotation:
    """cos and sin of position * frequency, for all layers at once.

    Args:
        positions: of each token.
        frequencies: radians a position, E/2 of them.

    Returns:
        At least float32.
    """
    frequencies = upcast(frequencies).reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(frequencies.dtype)[..., None] * frequencies
    # Without the barrier XLA would compute them again in every layer.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x: Float[Array, "*batch X E"], rotation: Rotation) -> Float[Array, "*batch X E"]:
    """Rotary position embedding with explicit positions, in the half-split layout.

        (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

    Source: Su et al. 2021, eq. 34, https://arxiv.org/abs/2104.09864, with the pairing
    (i, i + E/2) that published checkpoints use.

    Args:
        x: queries or keys, any number of heads X.
        rotation: of each token.

    Returns:
        Same shape and type as `x`; computed in at least float32.
    """
    cos, sin = (part[..., None, None, :] for part in rotation)
    halves = upcast(x).reshape(*x.shape[:-1], 2, -1)
    # Turned over rather than put together anew from its halves: one pass, forward and backward.
    signs = jnp.array([-1.0, 1.0], halves.dtype).reshape((1,) * (x.ndim - 1) + (2, 1))
    rotated = halves * cos + jnp.flip(halves, axis=-2) * (signs * sin)
    return rotated.reshape(x.shape).astype(x.dtype)
