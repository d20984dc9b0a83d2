"""Masked reductions: the only place where a per-token quantity becomes a number."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Inexact

from ..types import Reduction, Scalar


def wider_type(first: DTypeLike, second: DTypeLike) -> jnp.dtype:
    """The type that holds `first` and `second`, said outright: strict promotion allows that."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


def at_least_float32(x: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or in its own type where that is wider."""
    return x.astype(wider_type(x.dtype, jnp.float32))


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of `x` where `mask` holds; what stands elsewhere, NaN included, does not enter.

    Args:
        x: values, any shape.
        mask: the places that count, same shape.

    Returns:
        A rank-0 array in at least float32; 0 where nothing counts.
    """
    return jnp.sum(jnp.where(mask, at_least_float32(x), 0.0))


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean of `x` over the places where `mask` holds; 0 where there is none.

    Args:
        x: values, any shape.
        mask: the places that count, same shape.

    Returns:
        A rank-0 array in at least float32.
    """
    total = masked_sum(x, mask)
    return total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)


def whiten(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, epsilon: Scalar = 1e-8
) -> Float[Array, "*shape"]:
    """Shift and scale to mean 0 and variance 1 over all valid places of the whole batch.

        y = (x - mean(x)) / sqrt(var(x) + epsilon),   var with divisor n

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".

    Args:
        x: values, any shape.
        mask: the places that count, same shape.
        epsilon: added to the variance; keeps (nearly) constant input small.

    Returns:
        Same shape, at least float32, 0 where `mask` is false.
    """
    x = at_least_float32(x)
    centred = jnp.where(mask, x - masked_mean(x, mask), 0.0)
    variance = masked_mean(jnp.square(centred), mask)
    white = centred / jnp.sqrt(variance + jnp.asarray(epsilon, x.dtype))
    # Once more, for a NaN at a valid place would reach the masked ones through the variance.
    return jnp.where(mask, white, 0.0)


def token_mean(mask: Bool[Array, "M T"]) -> Float[Array, "M T"]:
    """Every valid token of the minibatch weighs the same.

        w = mask / sum(mask)

    Source: Yu et al. 2025 (DAPO), eq. 12. An all-false mask gives weight 0 everywhere.
    """
    weights = mask.astype(jnp.result_type(float))
    return weights / jnp.maximum(jnp.sum(weights), 1.0)


def sequence_mean(mask: Bool[Array, "M T"]) -> Float[Array, "M T"]:
    """Every non-empty sequence weighs the same.

        w = mask / length / (number of non-empty rows)

    Source: Shao et al. 2024 (GRPO), eq. 3.
    """
    weights = mask.astype(jnp.result_type(float))
    lengths = jnp.sum(weights, axis=1, keepdims=True)
    rows = jnp.maximum(jnp.sum(lengths > 0).astype(weights.dtype), 1.0)
    return weights / jnp.maximum(lengths, 1.0) / rows


def fixed_mean(tokens_per_sequence: int) -> Reduction:
    """A reduction with a constant denominator.

        w = mask / (M * tokens_per_sequence)

    The weight of a token does not depend on any length, so the gradient estimate stays
    unbiased. Source: Liu et al. 2025 (Dr. GRPO), section 3.2.

    Raises:
        ValueError: `tokens_per_sequence` is below 1.
    """
    if tokens_per_sequence < 1:
        raise ValueError(
            f"fixed_mean needs tokens_per_sequence >= 1, got {tokens_per_sequence}; "
            "pass the number of response slots, max_new_tokens."
        )

    def reduction(mask: Bool[Array, "M T"]) -> Float[Array, "M T"]:
        return mask.astype(jnp.result_type(float)) / (mask.shape[0] * tokens_per_sequence)

    return reduction
