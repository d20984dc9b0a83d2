"""The multilayer perceptron of a layer."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .kernels.glu import Activation, glu
from .linear import Linear, Project, separately


class MLP(eqx.Module):
    """y = (f(x W_gate) * x W_up) W_down, or f(x W_up) W_down without a gate; f the activation.

    Source: Shazeer 2020, eq. 6, https://arxiv.org/abs/2002.05202.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    activation: Activation = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        # Gate and up as one product are slower here, forward and backward (bench/TRIED.md).
        return self.by(separately)(x)

    def by(self, project: Project):
        """The same, its linear maps computed by `project`."""
        down = project(self.down)
        inputs = project(self.up) if self.gate is None else project(self.gate, self.up)

        @jax.named_scope("mlp")
        def apply(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
            hidden = inputs(x)
            if self.gate is None:
                return down(self.activation(*hidden))[0]
            return down(glu(self.activation, *hidden))[0]

        return apply
