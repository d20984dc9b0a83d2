"""The multilayer perceptron of a layer."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .kernels.glu import glu
from .linear import Linear, decoding


class GatedMLP(eqx.Module):
    """y = (silu(x W_gate) * x W_up) W_down.

    Source: Shazeer 2020, eq. 6 (https://arxiv.org/abs/2002.05202).
    """

    gate: Linear
    up: Linear
    down: Linear

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(glu(jax.nn.silu, self.gate(x), self.up(x)))

    def decoder(self):
        """The same for the few rows of a decode step; called once, outside the loop."""
        inputs, down = decoding(self.gate, self.up), decoding(self.down)

        @jax.named_scope("mlp")
        def apply(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
            return down(glu(jax.nn.silu, *inputs(x)))[0]

        return apply
