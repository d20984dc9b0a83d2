"""Estimators of the KL divergence from sampled log-ratios.

Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

x = log policy(token) - log reference(token), for a token drawn from the policy. Every estimator
estimates KL(policy || reference) in value. As a loss on tokens of the current policy their
gradients differ:

    k1: 0      k2: grad KL(policy || reference)      k3: grad KL(reference || policy)

`with_gradient_of` pairs the value of one with the gradient of another.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..functions import KLEstimator

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp: e^20 = 4.9e8 is far beyond any ratio that trains."""


def clamp_log_ratio(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """min(max(x, -20), 20): keeps exp(x) finite, with gradient 0 where the clamp acts."""
    return jnp.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def is_clamped(x: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """True where `clamp_log_ratio` changes x: what the metrics count."""
    return jnp.abs(x) > LOG_RATIO_LIMIT


def k1(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The log-ratio itself: unbiased in value, high variance, may be negative.

        k1 = x

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        log_ratio: x = log policy - log reference per token, nats.

    Returns:
        Estimate per token, nats, same shape.
    """
    return log_ratio


def k2(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Half the square: biased in value, its gradient at the sampling policy is that of the KL.

        k2 = x^2 / 2

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        log_ratio: x = log policy - log reference per token, nats; clamped to +-20.

    Returns:
        Estimate per token, nats, same shape, never negative.
    """
    return 0.5 * jnp.square(clamp_log_ratio(log_ratio))


def k3(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k1 with a control variate: unbiased in value, low variance, never negative.

        k3 = exp(-x) - 1 + x

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        log_ratio: x = log policy - log reference per token, nats; clamped to +-20.

    Returns:
        Estimate per token, nats, same shape.
    """
    x = clamp_log_ratio(log_ratio)
    return jnp.expm1(-x) + x


def with_gradient_of(value: KLEstimator, gradient: KLEstimator) -> KLEstimator:
    """An estimator with the value of one and the gradient of another.

        k(x) = stop_gradient(value(x)) + gradient(x) - stop_gradient(gradient(x))

    Example: `with_gradient_of(k3, k2)` reports k3 and follows the gradient of the KL.
    """

    def estimator(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        slope = gradient(log_ratio)
        # The slopes cancel first, and exactly, so that a large one adds no rounding to the value.
        return jax.lax.stop_gradient(value(log_ratio)) + (slope - jax.lax.stop_gradient(slope))

    return estimator
