"""Products of a matrix with the few rows of a decode step."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LARGE = 2**18
"""Weights: 1 MB in float32, about what a core's own cache holds."""

STRIPS = 64, 32
"""Columns of a strip, the best first: with 128 XLA packs the matrix anew in every product."""

LARGEST_STRIP = 2**15
"""Numbers in a strip. XLA seems to hand out larger ones to the cores 64 at a time."""

MANY_STRIPS = 256
"""So many of the larger ones keep the cores busy."""

STRIPS_FROM = 512
"""Outputs from which strips are faster for 2 to 8 rows."""

STRIPS_ARE_FAST = jax.__version_info__ >= (0, 12)
"""Before, XLA computed strips no faster for 8 rows, and slower for 1 and for 16."""

FEW = 64
"""Rows up to which a matrix on the left is faster."""


class LaidOut(eqx.Module):
    """x W^T for the few rows of many decode steps, W being laid out once before them.

    XLA's product on CPUs reads its right operand slowly, as if it were packed anew in every call.
    A sum of products over strips of 64 or 32 columns, each contiguous as [in, columns], is computed
    as a product too, but reads W as it lies. Where W is small, has few outputs for its inputs, or
    its type is not float32, W stays as it is and is the left operand for up to 64 rows. Other
    devices get the plain product. The times are in bench/TRIED.md.

    Attributes:
        weight: W [out, in]; with strips, in the memory of a CPU, [out / strip, in, strip].
        strip: columns of the strips that CPUs have; 0 for none.
    """

    weight: Float[Array, "out in"]
    strip: int = eqx.field(static=True)

    @classmethod
    def of(cls, weight: Float[Array, "out in"]) -> "LaidOut":
        """Lay out `weight`, which has the type of the rows to come."""
        strip = _strip_of(weight)
        if strip:
            weight = jax.lax.platform_dependent(
                weight,
                cpu=lambda w: w.reshape(-1, strip, w.shape[1]).swapaxes(1, 2).reshape(w.shape),
                default=lambda w: w,
            )
        # The barrier keeps XLA from undoing the layout inside the loop.
        return cls(jax.lax.optimization_barrier(weight), strip)

    def __call__(
        self, x: Float[Array, "rows in"], dtype: DTypeLike | None = None
    ) -> Float[Array, "rows out"]:
        """The product, in `dtype`; None for the type of `x`."""
        plain = partial(_plain, dtype)
        if self.strip:
            form = partial(_in_strips, self.strip)
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
    # Without the barrier XLA would turn the operands around again.
    return jax.lax.optimization_barrier(jnp.einsum("oi,bi->ob", weight, x)).T


def _in_strips(strip, x, weight):
    # Without the barrier XLA may keep the repeated strips of two products that stand together.
    x, weight = jax.lax.optimization_barrier((x, weight))
    strips = weight.reshape(-1, x.shape[1], strip)
    sums = jnp.sum(strips[:, None] * x[None, :, :, None], axis=2)
    return sums.swapaxes(0, 1).reshape(x.shape[0], -1)
