"""Linear maps."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .kernels.decode_matmul import Projection, decode_projection
from .kernels.fused_projection import fused_projection


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
        return project(x, self)[0]


def project(x: Float[Array, "*batch in"], *layers: Linear) -> tuple[Float[Array, "*batch _"], ...]:
    """What each layer makes of `x`, by one product."""
    return fused_projection(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


def decoding(*layers: Linear) -> Projection:
    """`project` for the few rows of many decode steps: called once, outside the loop."""
    return decode_projection([layer.weight for layer in layers], [layer.bias for layer in layers])
