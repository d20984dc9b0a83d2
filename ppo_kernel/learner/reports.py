"""Stage 5b, inside: sums over an optimizer step, and the metrics that they become."""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..types import Metrics


class StepSums(NamedTuple):
    """Sums over the valid tokens of an optimizer step; all are 0 where it was left out.

    Attributes:
        terms: terms of the loss and gradient norms; their mean over steps is reported.
        tokens: how many tokens were valid.
        means: per-token quantities; their mean over the tokens of all steps is reported.
        counters: reported as they are.
        log_ratio: of |log policy - log old policy|; the first step's mean is reported.
    """

    terms: Metrics
    tokens: Float[Array, "*steps"]
    means: Metrics
    counters: Metrics
    log_ratio: Float[Array, "*steps"] | None = None

    @classmethod
    def joined(cls, sums: "Iterable[StepSums]") -> "StepSums":
        """The sums of both models on the same tokens, the policy's first."""
        first, *rest = sums
        for other in rest:
            first = first._replace(
                terms=join(first.terms, other.terms),
                means=join(first.means, other.means),
                counters=join(first.counters, other.counters),
            )
        return first

    def metrics(self, applied: Bool[Array, " steps"]) -> Metrics:
        """Sums [steps] -> what is reported of all steps; `applied` says which were taken."""
        steps = jnp.maximum(jnp.sum(applied, dtype=self.tokens.dtype), 1.0)
        tokens = jnp.maximum(jnp.sum(self.tokens), 1.0)
        reported = join(
            {name: jnp.sum(x) / steps for name, x in self.terms.items()},
            {name: jnp.sum(x) / tokens for name, x in self.means.items()},
            {name: jnp.sum(x) for name, x in self.counters.items()},
        )
        if self.log_ratio is not None:
            first = self.log_ratio[0] / jnp.maximum(self.tokens[0], 1.0)
            reported = join(reported, {"initial_log_ratio": first})
        return reported


def join(*groups: Metrics) -> Metrics:
    """All metrics in one dictionary.

    Args:
        groups: metrics by name.

    Returns:
        All of them.

    Raises:
        ValueError: two have the same name.
    """
    joined: Metrics = {}
    for group in groups:
        twice = sorted(joined.keys() & group.keys())
        if twice:
            raise ValueError(
                f"two metrics have the name {twice[0]!r}; give that of your reward or loss another."
            )
        joined |= group
    return joined
