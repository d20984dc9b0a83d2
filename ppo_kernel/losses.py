"""Stage 5a: per-token losses. They take arrays, return arrays, and reduce nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .ops.kl import clamp_log_ratio
from .ops.masked import at_least_float32
from .types import Scalar


def clipped_policy_loss(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_ratio_low: Scalar,
    clip_ratio_high: Scalar,
    dual_clip: Scalar | None = None,
) -> Float[Array, "*shape"]:
    """The clipped surrogate of PPO, negated.

        rho  = exp(logprob - old_logprob)
        loss = max(-A rho, -A clip(rho, 1 - low, 1 + high))
        with dual_clip c:  loss = min(loss, -c A) where A < 0

    Sources: Schulman et al. 2017, eq. 7; separate bounds: Yu et al. 2025 (DAPO), eq. 10; dual
    clip: Ye et al. 2020, eq. 5. The log-ratio is clamped to +-20 before exp.

    Args:
        logprobs: of the taken tokens under the policy that is trained, nats.
        old_logprobs: under the policy that acted, nats.
        advantages: constant with respect to the parameters.
        clip_ratio_low, clip_ratio_high: >= 0.
        dual_clip: > 1, or None.

    Returns:
        Loss per token, at least float32.
    """
    ratio, advantages = _ratio(logprobs, old_logprobs), at_least_float32(advantages)
    low, high = jnp.asarray(clip_ratio_low, ratio.dtype), jnp.asarray(clip_ratio_high, ratio.dtype)
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        bound = -jnp.asarray(dual_clip, ratio.dtype) * advantages
        loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    return loss


def is_clipped(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_ratio_low: Scalar,
    clip_ratio_high: Scalar,
) -> Bool[Array, "*shape"]:
    """True where the clip decides the policy loss, so that the token has no gradient.

        (A > 0 and rho > 1 + high)  or  (A < 0 and rho < 1 - low)

    Arguments as in `clipped_policy_loss`; its mean over valid tokens is the clip fraction. A token
    that `dual_clip` bounds has no gradient either, and is not counted.

    Returns:
        The shape of the arguments.
    """
    ratio, advantages = _ratio(logprobs, old_logprobs), at_least_float32(advantages)
    low, high = jnp.asarray(clip_ratio_low, ratio.dtype), jnp.asarray(clip_ratio_high, ratio.dtype)
    return ((advantages > 0) & (ratio > 1.0 + high)) | ((advantages < 0) & (ratio < 1.0 - low))


def clipped_value_loss(
    values: Float[Array, "*shape"],
    old_values: Float[Array, "*shape"],
    returns: Float[Array, "*shape"],
    *,
    value_clip: Scalar | None = None,
) -> Float[Array, "*shape"]:
    """Half squared error, with the change of the value clipped.

        loss = max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2

    Source: Schulman et al. 2017, eq. 9, with the clip of the OpenAI baselines (Huang et al. 2022,
    "The 37 Implementation Details of PPO", detail 9). None for `value_clip` leaves (V - R)^2 / 2.

    Args:
        values: of the critic that is trained.
        old_values: at the time of the rollout.
        returns: regression targets.
        value_clip: c > 0, in reward units, or None.

    Returns:
        Loss per token, at least float32.
    """
    values, old_values, returns = map(at_least_float32, (values, old_values, returns))
    loss = jnp.square(values - returns)
    if value_clip is not None:
        bound = jnp.asarray(value_clip, values.dtype)
        near = old_values + jnp.clip(values - old_values, -bound, bound)
        loss = jnp.maximum(loss, jnp.square(near - returns))
    return 0.5 * loss


def _ratio(
    logprobs: Float[Array, "*shape"], old_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """exp of the clamped log-ratio, in at least float32."""
    return jnp.exp(clamp_log_ratio(at_least_float32(logprobs) - at_least_float32(old_logprobs)))
