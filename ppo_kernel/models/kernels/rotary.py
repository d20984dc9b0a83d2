"""Rotary position embedding: cosines and sines once, each rotation in one pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...ops.dtypes import upcast


class Rotation(NamedTuple):
    """cos and sin of the angles by which the tokens of a batch are rotated."""

    cos: Float[Array, "*batch half"]
    sin: Float[Array, "*batch half"]


def plain_rotation_of(
    positions: Int[Array, "*batch"], frequencies: Float[Array, " half"]
) -> Rotation:
    """cos and sin of position * frequency."""
    frequencies = upcast(frequencies).reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(frequencies.dtype)[..., None] * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotation_of(positions: Int[Array, "*batch"], frequencies: Float[Array, " half"]) -> Rotation:
    """cos and sin of position * frequency, once for all layers.

    Args:
        positions: of each token.
        frequencies: radians per position, one for each pair of channels.

    Returns:
        At least float32.
    """
    # Without the barrier XLA would compute them again in every layer.
    return jax.lax.optimization_barrier(plain_rotation_of(positions, frequencies))


def plain_rotate(x: Float[Array, "*batch X E"], rotation: Rotation) -> Float[Array, "*batch X E"]:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); see `rotate`."""
    cos, sin = (part[..., None, :] for part in rotation)
    half = cos.shape[-1]
    first, second, rest = jnp.split(upcast(x), (half, 2 * half), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rotate(x: Float[Array, "*batch X E"], rotation: Rotation) -> Float[Array, "*batch X E"]:
    """Rotary position embedding with explicit positions, in the half-split layout.

        (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

    Source: Su et al. 2021, eq. 34 (https://arxiv.org/abs/2104.09864), with the pairing
    (i, i + R/2) of published checkpoints. R is twice the number of angles; channels from R on stay
    as they are.

    Args:
        x: queries or keys, any number of heads X.
        rotation: of each token.

    Returns:
        Same shape and type as `x`; computed in at least float32.
    """
    width = 2 * rotation.cos.shape[-1]
    if width < x.shape[-1]:
        rotated = rotate(x[..., :width], rotation)
        return jnp.concatenate([rotated, x[..., width:]], axis=-1)
    cos, sin = (part[..., None, None, :] for part in rotation)
    halves = upcast(x).reshape(*x.shape[:-1], 2, -1)
    # A flip instead of a concatenation of the two halves: one pass, forward and backward.
    signs = jnp.array([-1.0, 1.0], halves.dtype).reshape((1,) * (x.ndim - 1) + (2, 1))
    rotated = halves * cos + jnp.flip(halves, axis=-2) * (signs * sin)
    return rotated.reshape(x.shape).astype(x.dtype)
