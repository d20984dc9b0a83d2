"""Sums, means and whitening over the valid places of an array."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..types import Scalar
from .dtypes import upcast


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of `x` where `mask` is true.

        sum_i mask_i x_i

    Values elsewhere, NaN included, do not enter.

    Args:
        x: values, any shape.
        mask: true at valid places, same shape.

    Returns:
        A rank-0 array, at least float32; 0 for an all-false mask.
    """
    return jnp.sum(jnp.where(mask, upcast(x), 0.0))


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean of `x` where `mask` is true; 0 for an all-false mask.

        sum_i mask_i x_i / max(sum_i mask_i, 1)

    Args:
        x: values, any shape.
        mask: true at valid places, same shape.

    Returns:
        A rank-0 array, at least float32.
    """
    total = masked_sum(x, mask)
    return total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)


def whiten(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, epsilon: Scalar = 1e-8
) -> Float[Array, "*shape"]:
    """Shift and scale to mean 0 and variance 1 over all valid places of the whole batch.

        y = (x - mean(x)) / sqrt(var(x) + epsilon),   var with divisor n

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO",
    https://arxiv.org/abs/2403.17031.

    Args:
        x: values, any shape.
        mask: true at valid places, same shape.
        epsilon: added to the variance, so that (nearly) constant input stays small.

    Returns:
        Same shape, at least float32, 0 where `mask` is false.
    """
    x = upcast(x)
    centred = jnp.where(mask, x - masked_mean(x, mask), 0.0)
    variance = masked_mean(jnp.square(centred), mask)
    white = centred / jnp.sqrt(variance + jnp.asarray(epsilon, x.dtype))
    # Masked again: a NaN at a valid place reaches all others through the variance.
    return jnp.where(mask, white, 0.0)
