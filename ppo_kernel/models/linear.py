"""Linear maps, and the ways to compute several of one input."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .kernels.decode_matmul import Projection, decode_projection
from .kernels.fused_projection import fused_projection


class Linear(eqx.Module):
    """y = x W (+ b). `weight` is [in, out], the transpose of PyTorch's.

    Attributes:
        weight, bias: W and b; no b where None.
        axes: logical axes of W, as in `sharding.AXES`; None for none.
    """

    weight: Float[Array, "in out"]
    bias: Float[Array, " out"] | None = None
    axes: tuple[str, str] | None = eqx.field(static=True, default=None)

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        in_size: int,
        out_size: int,
        *,
        scale: float = 1.0,
        bias: bool = False,
        axes: tuple[str, str] | None = None,
    ) -> "Linear":
        """Normal weights of standard deviation scale / sqrt(in), zero bias. Consumes `key`."""
        weight = scale * in_size**-0.5 * jax.random.normal(key, (in_size, out_size))
        return cls(weight, jnp.zeros(out_size) if bias else None, axes)

    def logical_axes(self) -> dict[str, tuple[str, ...]]:
        """Field -> its logical axes, for `sharding`."""
        return {} if self.axes is None else {"weight": self.axes, "bias": self.axes[1:]}

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return fused(self)(x)[0]


@runtime_checkable
class Project(Protocol):
    """Layers of one input -> the function that computes them all."""

    def __call__(self, *layers: Linear) -> Projection: ...


def separately(*layers: Linear) -> Projection:
    """One product per layer."""
    return lambda x: tuple(layer(x) for layer in layers)


def fused(*layers: Linear) -> Projection:
    """One product for all layers."""
    weights, biases = [x.weight for x in layers], [x.bias for x in layers]
    return lambda x: fused_projection(x, weights, biases)


def decoding(*layers: Linear) -> Projection:
    """One product for all layers, its matrix packed here for the few rows of many decode steps."""
    return decode_projection([x.weight for x in layers], [x.bias for x in layers])
