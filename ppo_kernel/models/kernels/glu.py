"""The gated activation of an MLP."""

from functools import partial
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float


@runtime_checkable
class Activation(Protocol):
    """A function of each element: `jax.nn.silu`, `jax.nn.gelu`, ..."""

    def __call__(self, x: Float[Array, "*shape"], /) -> Float[Array, "*shape"]: ...


def plain_glu(
    activation: Activation, gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]
) -> Float[Array, "*batch F"]:
    """activation(gate) * up."""
    return activation(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def glu(
    activation: Activation, gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]
) -> Float[Array, "*batch F"]:
    """activation(gate) * up, whose backward pass reads `gate` and `up` alone.

        dgate = dy * up * activation'(gate),   dup = dy * activation(gate)

    With silu this is SwiGLU, with gelu GeGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).
    XLA's CPU backend would store the sigmoid, write it once and read it three times. Computing it
    again costs less. There is no forward-mode derivative.
    """
    return activation(gate) * up


def _forward(activation, gate, up):
    return activation(gate) * up, (gate, up)


def _backward(activation, residuals, gradient):
    gate, up = residuals
    gate = _recompute(gate)
    _, pullback = jax.vjp(activation, gate)
    (gate_gradient,) = pullback(gradient * up)
    # Twice: XLA would merge two equal barriers, and store the sigmoid for both gradients.
    return gate_gradient, gradient * activation(_recompute(gate))


glu.defvjp(_forward, _backward)


def _recompute(x: Array) -> Array:
    """`x`; on CPUs everything derived from the result is computed again."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
