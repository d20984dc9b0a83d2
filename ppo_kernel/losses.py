"""Stage 5a: per-token losses. They take arrays, return arrays, and reduce nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .functions import Reduction
from .ops.dtypes import upcast
from .ops.kl import clamp_log_ratio, k3
from .types import LossInputs, Scalar, TokenMetrics, ValueLossInputs


def ppo_policy_loss(
    inputs: LossInputs,
    *,
    clip_ratio_low: Scalar,
    clip_ratio_high: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float[Array, "M T"], TokenMetrics]:
    """`clipped_policy_loss` as a `functions.PolicyLoss`, with its metrics.

    Args:
        inputs: the log-probabilities, old ones and advantages are used.
        clip_ratio_low, clip_ratio_high, dual_clip: as in `clipped_policy_loss`.

    Returns:
        (loss per token, metrics): `approx_kl`, k3 of the policy that acted against the one in
        training, nats; `clip_fraction`, see `is_clipped`.
    """
    arrays = inputs.logprobs, inputs.old_logprobs, inputs.advantages
    bounds = {"clip_ratio_low": clip_ratio_low, "clip_ratio_high": clip_ratio_high}
    metrics: TokenMetrics = {
        "approx_kl": k3(-(inputs.logprobs - inputs.old_logprobs)),
        "clip_fraction": is_clipped(*arrays, **bounds),
    }
    return clipped_policy_loss(*arrays, **bounds, dual_clip=dual_clip), metrics


def ppo_value_loss(
    inputs: ValueLossInputs, *, value_clip: Scalar | None = None
) -> tuple[Float[Array, "M T"], TokenMetrics]:
    """`clipped_value_loss` as a `functions.ValueLoss`; it has no metrics.

    Args:
        inputs: the values, old ones and returns are used.
        value_clip: as in `clipped_value_loss`.

    Returns:
        (loss per token, no metrics).
    """
    return clipped_value_loss(
        inputs.values, inputs.old_values, inputs.returns, value_clip=value_clip
    ), {}


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

    Sources: Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347; separate bounds:
    Yu et al. 2025 (DAPO), eq. 10, https://arxiv.org/abs/2503.14476; dual clip: Ye et al.
    2020, eq. 5, https://arxiv.org/abs/1912.09729. The log-ratio is clamped to +-20 before exp.

    Args:
        logprobs: of the taken tokens under the policy that is trained, nats.
        old_logprobs: under the policy that acted, nats.
        advantages: constant with respect to the parameters.
        clip_ratio_low, clip_ratio_high: >= 0.
        dual_clip: > 1, or None.

    Returns:
        Loss per token, at least float32.
    """
    ratio, advantages = _ratio(logprobs, old_logprobs), upcast(advantages)
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
    ratio, advantages = _ratio(logprobs, old_logprobs), upcast(advantages)
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

    Sources: Schulman et al. 2017, eq. 9, https://arxiv.org/abs/1707.06347, with the clip of the
    OpenAI baselines (Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details).
    None for `value_clip` leaves (V - R)^2 / 2.

    Args:
        values: of the critic that is trained.
        old_values: at the time of the rollout.
        returns: regression targets.
        value_clip: c > 0, in reward units, or None.

    Returns:
        Loss per token, at least float32.
    """
    values, old_values, returns = map(upcast, (values, old_values, returns))
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
    return jnp.exp(clamp_log_ratio(upcast(logprobs) - upcast(old_logprobs)))


def token_mean(mask: Bool[Array, "M T"]) -> Float[Array, "M T"]:
    """Every valid token of the minibatch weighs the same.

        w = mask / sum(mask)

    Source: Yu et al. 2025 (DAPO), eq. 12, https://arxiv.org/abs/2503.14476. An all-false mask
    gives weight 0 everywhere.
    """
    weights = mask.astype(jnp.result_type(float))
    return weights / jnp.maximum(jnp.sum(weights), 1.0)


def sequence_mean(mask: Bool[Array, "M T"]) -> Float[Array, "M T"]:
    """Every non-empty sequence weighs the same.

        w = mask / length / (number of non-empty rows)

    Source: Shao et al. 2024 (GRPO), eq. 3, https://arxiv.org/abs/2402.03300.
    """
    weights = mask.astype(jnp.result_type(float))
    lengths = jnp.sum(weights, axis=1, keepdims=True)
    rows = jnp.maximum(jnp.sum(lengths > 0).astype(weights.dtype), 1.0)
    return weights / jnp.maximum(lengths, 1.0) / rows


def fixed_mean(tokens_per_sequence: int) -> Reduction:
    """A reduction with a constant denominator.

        w = mask / (M * tokens_per_sequence)

    The weight of a token does not depend on any length, so the gradient estimate stays
    unbiased.

    Source: Liu et al. 2025 (Dr. GRPO), section 3.2, https://arxiv.org/abs/2503.20783.

    Raises:
        ValueError: `tokens_per_sequence` is below 1.
    """
    if tokens_per_sequence < 1:
        raise ValueError(
            f"fixed_mean needs tokens_per_sequence >= 1, got {tokens_per_sequence}; "
            "pass the number of response slots, max_new_tokens."
        )

    def reduction(mask: Bool[Array, "M T"]) -> Float[Array, "M T"]:
        return mask.astype(jnp.result_type(float)) / (mask.shape[0] * tokens_per_sequence)

    return reduction
