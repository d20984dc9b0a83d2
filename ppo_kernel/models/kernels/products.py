"""Products of narrow types whose sums stay in at least float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from ...ops.dtypes import promote_types, upcast


def plain_wide_einsum(
    subscripts: str, x: Inexact[Array, "*some"], y: Inexact[Array, "*others"]
) -> Inexact[Array, "*shape"]:
    """`jnp.einsum` of the operands in at least float32; arguments as in `wide_einsum`."""
    return jnp.einsum(subscripts, upcast(x), upcast(y))


def wide_einsum(
    subscripts: str, x: Inexact[Array, "*some"], y: Inexact[Array, "*others"]
) -> Inexact[Array, "*shape"]:
    """`jnp.einsum` of two arrays whose sums are not rounded to their type.

    The operands stay narrow, as the matrix units of GPUs and TPUs want them.

    Args:
        subscripts: as of `jnp.einsum`.
        x, y: of one type.

    Returns:
        At least float32.
    """
    wide = promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=wide)


def plain_wide_product(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """x W^T of the operands in at least float32; arguments as in `wide_product`."""
    return upcast(x) @ upcast(weight).T


def wide_product(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """x W^T, not rounded to the type of its operands: a bfloat16 logit of 16 would be off by 0.06.

    The products of its gradient take operands of that type, and are as fast as those of the layers.
    For types narrower than float32 there is no forward-mode derivative.

    Args:
        x: rows of hidden states.
        weight: of the same type.

    Returns:
        At least float32.
    """
    if x.dtype == promote_types(x.dtype, jnp.float32):
        return x @ weight.T
    return _wide_product(x, weight)


@jax.custom_vjp
def _wide_product(x, weight):
    return wide_einsum("ri,oi->ro", x, weight)


def _forward(x, weight):
    return _wide_product(x, weight), (x, weight)


def _backward(residuals, gradient):
    x, weight = residuals
    gradient = gradient.astype(x.dtype)
    return gradient @ weight, gradient.T @ x


_wide_product.defvjp(_forward, _backward)
