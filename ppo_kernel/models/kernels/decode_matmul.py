"""Products of the few rows of a decode step with matrices packed once, before the loop."""

from functools import partial
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .fused_projection import (
    Biases,
    Weights,
    add_biases,
    plain_fused_projection,
    split_columns,
)
from .matmul import matmul

LARGE = 2**18
"""Weights: 1 MB in float32, about what a core's own cache holds."""

STRIPS = 64, 32
"""Columns of a strip, the best first: with 128 XLA packs the matrix again in every product."""

LARGEST_STRIP = 2**15
"""Numbers in a strip. XLA seems to hand out larger ones to the cores 64 at a time."""

MANY_STRIPS = 256
"""From so many of them on, larger ones keep the cores busy too."""

STRIPS_FROM = 512
"""Outputs from which strips are faster for 2 to 8 rows."""

STRIPS_ARE_FAST = jax.__version_info__ >= (0, 12)
"""Before, XLA computed strips no faster for 8 rows, and slower for 1 and for 16."""

FEW = 64
"""Rows up to which a matrix on the left is faster."""


def plain_decode_product(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """x W^T: what `DecodeMatrix.of(weight)(x)` computes."""
    return x @ weight.T


class DecodeMatrix(eqx.Module):
    """x W^T for the few rows of many decode steps, W packed once before them.

    XLA's CPU backend reads the right operand of a product slowly, as if it were packed in every
    call. A sum of products over strips of 64 or 32 columns, each contiguous as [in, columns], is
    compiled to a product too, but reads W in its own layout. Where W is small, has few outputs for
    its inputs, or is not float32, W stays as it is and is the left operand for up to 64 rows. Other
    devices get the plain product. The times are in bench/TRIED.md.

    Attributes:
        weight: W [out, in]; on CPUs, with strips, its memory holds [out / strip, in, strip].
        strip: columns per strip on CPUs; 0 for no strips.
    """

    weight: Float[Array, "out in"]
    strip: int = eqx.field(static=True)

    @classmethod
    def of(cls, weight: Float[Array, "out in"]) -> "DecodeMatrix":
        """Pack `weight`, which has the type of the rows to come."""
        strip = _strip_of(weight)
        if strip:
            weight = jax.lax.platform_dependent(
                weight,
                cpu=lambda w: w.reshape(-1, strip, w.shape[1]).swapaxes(1, 2).reshape(w.shape),
                default=lambda w: w,
            )
        # Without the barrier XLA would undo the packing inside the loop.
        return cls(jax.lax.optimization_barrier(weight), strip)

    def __call__(
        self, x: Float[Array, "rows in"], dtype: DTypeLike | None = None
    ) -> Float[Array, "rows out"]:
        """The product, in `dtype`; None for the type of `x`."""
        plain = partial(_plain, dtype)
        if self.strip:
            form = partial(_by_strips, self.strip)
        elif x.shape[0] <= FEW and x.dtype == jnp.float32:
            form = _on_the_left
        else:
            return plain(x, self.weight)
        return jax.lax.platform_dependent(x, self.weight, cpu=form, default=plain)


def _strip_of(weight: Float[Array, "out in"]) -> int:
    outs, ins = weight.shape
    large = weight.size >= LARGE and outs >= STRIPS_FROM
    if not STRIPS_ARE_FAST or not large or weight.dtype != jnp.float32:
        return 0
    for strip in STRIPS:
        shared_out = strip * ins <= LARGEST_STRIP or outs // strip >= MANY_STRIPS
        if outs % strip == 0 and shared_out:
            return strip
    return 0


def _plain(dtype, x, weight):
    return jnp.matmul(x, weight.T, preferred_element_type=dtype)


def _on_the_left(x, weight):
    # Without the barrier XLA would swap the operands again.
    return jax.lax.optimization_barrier(jnp.einsum("oi,bi->ob", weight, x)).T


def _by_strips(strip, x, weight):
    # Without the barrier XLA may store the repeated strips of two adjacent products.
    x, weight = jax.lax.optimization_barrier((x, weight))
    strips = weight.reshape(-1, x.shape[1], strip)
    sums = jnp.sum(strips[:, None] * x[None, :, :, None], axis=2)
    return sums.swapaxes(0, 1).reshape(x.shape[0], -1)


@runtime_checkable
class Projection(Protocol):
    """Rows -> one array per linear map."""

    def __call__(self, x: Float[Array, "B in"], /) -> tuple[Float[Array, "B _"], ...]: ...


def plain_decode_projection(weights: Weights, biases: Biases) -> Projection:
    """The function x -> (x W_i + b_i for each i)."""
    return lambda x: plain_fused_projection(x, weights, biases)


def decode_projection(weights: Weights, biases: Biases) -> Projection:
    """The function x -> (x W_i + b_i for each i), as one product whose matrix is packed here.

    Small matrices stay as they are: their weights stay in a core's cache from one step to the next,
    where every form is as fast.

    Args:
        weights: [in, out_i] each, of the type of the rows to come.
        biases: [out_i] each, None for none.

    Returns:
        To be called in the decode loop.
    """
    if sum(weight.size for weight in weights) < LARGE:
        return lambda x: add_biases([matmul(x, weight) for weight in weights], biases)
    joint = DecodeMatrix.of(jnp.concatenate([weight.T for weight in weights]))
    sizes = [weight.shape[1] for weight in weights]
    return lambda x: add_biases(split_columns(joint(x), sizes), biases)
