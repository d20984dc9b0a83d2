"""Several linear maps of one input as one product."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .matmul import matmul

Weights = Sequence[Float[Array, "in _"]]
Biases = Sequence[Float[Array, " _"] | None]


def plain_fused_projection(
    x: Float[Array, "*batch in"], weights: Weights, biases: Biases
) -> tuple[Float[Array, "*batch _"], ...]:
    """x W_i + b_i for each i."""
    products = [x @ weight.astype(x.dtype) for weight in weights]
    return add_biases(products, biases)


def fused_projection(
    x: Float[Array, "*batch in"], weights: Weights, biases: Biases
) -> tuple[Float[Array, "*batch _"], ...]:
    """x W_i + b_i for each i, from one product x [W_1 W_2 ...].

    One product of many columns is faster than several of few, and so are its gradients.

    Args:
        x: rows.
        weights: [in, out_i] each; cast to the type of `x`.
        biases: [out_i] each, None for none.

    Returns:
        One array per weight.
    """
    joint = jnp.concatenate(weights, axis=1).astype(x.dtype)
    # Over flattened rows: the weight gradient then contracts one axis, which CPUs and GPUs do much
    # faster than two.
    rows = matmul(x.reshape(-1, x.shape[-1]), joint)
    sizes = [weight.shape[1] for weight in weights]
    return add_biases(split_columns(rows.reshape(*x.shape[:-1], -1), sizes), biases)


def split_columns(
    joint: Float[Array, "*batch outs"], sizes: Sequence[int]
) -> list[Float[Array, "*batch _"]]:
    """The columns of each map in their joint product."""
    return jnp.split(joint, np.cumsum(sizes)[:-1], axis=-1)


def add_biases(
    products: Sequence[Float[Array, "*batch _"]], biases: Biases
) -> tuple[Float[Array, "*batch _"], ...]:
    """Each product with its bias."""
    return tuple(
        x if bias is None else x + jnp.broadcast_to(bias.astype(x.dtype), x.shape)
        for x, bias in zip(products, biases, strict=True)
    )
