"""x W with a faster weight gradient."""

import jax
from jaxtyping import Array, Float

_MANY_COLUMNS = 512
"""From so many columns of the result on, more do not make a product faster."""


def plain_matmul(
    x: Float[Array, "rows in"], weight: Float[Array, "in out"]
) -> Float[Array, "rows out"]:
    """x W."""
    return x @ weight


@jax.custom_vjp
def matmul(x: Float[Array, "rows in"], weight: Float[Array, "in out"]) -> Float[Array, "rows out"]:
    """x W, whose weight gradient has its longer side last on CPUs.

        dx = dy W^T,   dW = x^T dy  or  (dy^T x)^T

    XLA's CPU backend computes a product with few columns and many terms at half its usual speed
    (bench/TRIED.md). There is no forward-mode derivative.
    """
    return x @ weight


def _forward(x, weight):
    return x @ weight, (x, weight)


def _backward(residuals, gradient):
    x, weight = residuals

    def plain(x, gradient):
        return x.T @ gradient

    def transposed(x, gradient):
        # Without the barrier XLA would undo the transposition.
        return jax.lax.optimization_barrier(gradient.T @ x).T

    if gradient.shape[1] >= min(x.shape[1], _MANY_COLUMNS):
        weight_gradient = plain(x, gradient)
    else:
        weight_gradient = jax.lax.platform_dependent(x, gradient, cpu=transposed, default=plain)
    return gradient @ weight.T, weight_gradient


matmul.defvjp(_forward, _backward)
