"""One rule of types: sums, exponentials, gradients and moments are at least float32."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact, PyTree


def promote_types(first: DTypeLike, second: DTypeLike) -> jnp.dtype:
    """The type that holds `first` and `second`, also where JAX's promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


def upcast(x: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or in its own type where that is wider."""
    return x.astype(promote_types(x.dtype, jnp.float32))


def upcast_tree(tree: PyTree) -> PyTree:
    """`tree` in at least float32, as gradients and moments are kept."""
    return jax.tree.map(upcast, tree)
