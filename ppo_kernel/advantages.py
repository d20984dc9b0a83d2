"""Stage 4: rewards and values -> advantages and returns."""

from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .functions import AdvantageEstimator
from .ops.checks import check_shape
from .ops.dtypes import promote_types, upcast
from .ops.masked import whiten
from .types import Scalar


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    bootstrap_values: Float[Array, " B"] | None = None,
    *,
    gamma: Scalar,
    lam: Scalar,
    groups: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation, by a reverse `lax.scan`.

        delta_t = r_t + gamma * V_next(t) - V_t
        A_t     = delta_t + gamma * lam * A_next(t),      returns_t = A_t + V_t

    next(t) is the next *valid* token, so the recursion carries through holes in the mask; after
    the last one V_next is the bootstrap value and A_next is 0.

    Source: Schulman et al. 2016, eqs. 11 and 16, https://arxiv.org/abs/1506.02438; there the
    rewards index starts at the action, as here.

    Args:
        rewards: per token, reward units; ignored where `mask` is false.
        values: V_t, before token t.
        mask: valid tokens.
        bootstrap_values: value after the last valid token; 0 for an ended episode, and by default.
        gamma: discount in [0, 1].
        lam: lambda in [0, 1]; 0 gives the TD residual, 1 the discounted return minus V_t.
        groups: not used: every sequence stands for itself.

    Returns:
        (advantages, returns), at least float32, 0 where `mask` is false.

    Raises:
        ValueError: shapes that differ.
    """
    del groups
    if bootstrap_values is None:
        bootstrap_values = jnp.zeros(mask.shape[:1], rewards.dtype)
    check_shape("rewards", rewards, mask.shape)
    check_shape("values", values, mask.shape)
    check_shape("bootstrap_values", bootstrap_values, mask.shape[:1])
    dtype = promote_types(upcast(rewards).dtype, values.dtype)
    rewards, values = rewards.astype(dtype), values.astype(dtype)
    gamma, lam = jnp.asarray(gamma, dtype), jnp.asarray(lam, dtype)
    last = bootstrap_values.astype(dtype)
    carry = (jnp.zeros_like(last), last, gamma, gamma * lam)
    _, advantages = jax.lax.scan(_backward, carry, (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask, advantages + values, 0.0)


@cache
def whitened(estimator: AdvantageEstimator) -> AdvantageEstimator:
    """The same estimator, its advantages shifted and scaled to mean 0 and variance 1.

        A <- (A - mean(A)) / sqrt(var(A) + 1e-8),   over all valid tokens of the whole batch

    The returns stay. `whitened(gae)` is the default of an iteration; an estimator that you pass is
    taken as it is, because whitening weighs sequences by their lengths.

    Args:
        estimator: `gae` or your own.

    Returns:
        The same function for the same estimator, so that nothing is compiled twice.
    """

    def estimate(rewards, values, mask, bootstrap_values, *, gamma, lam, groups):
        advantages, returns = estimator(
            rewards, values, mask, bootstrap_values, gamma=gamma, lam=lam, groups=groups
        )
        return whiten(advantages, mask), returns

    return estimate


def _backward(carry, inputs):
    """One token of the recursion. No closure: a call outside jit would compile each one anew."""
    next_advantage, next_value, gamma, decay = carry
    reward, value, valid = inputs
    delta = reward + gamma * next_value - value
    advantage = delta + decay * next_advantage
    carry = (
        jnp.where(valid, advantage, next_advantage),
        jnp.where(valid, value, next_value),
        gamma,
        decay,
    )
    return carry, jnp.where(valid, advantage, 0.0)
