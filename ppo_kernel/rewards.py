"""Stage 3: scores and log-probabilities -> one reward a token."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .functions import KLEstimator
from .ops.checks import check_shape
from .ops.dtypes import promote_types, upcast
from .types import Scalar


def token_rewards(
    scores: Float[Array, " B"] | Float[Array, "B T"],
    log_ratios: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    terminated: Bool[Array, " B"],
    *,
    kl_coef: Scalar,
    kl_estimator: KLEstimator | None,
    missing_eos_penalty: Scalar = 0.0,
    score_clip: Scalar | None = None,
) -> Float[Array, "B T"]:
    """Place the score on the last valid token and charge the KL penalty on every one.

        r_t = score * [t = last] - kl_coef * k(log_ratio_t)

    A score of shape [B, T] is a reward a token and lands where it stands. An empty response
    (no valid token) has no reward at all.

    Sources: Ziegler et al. 2019, eq. 2, https://arxiv.org/abs/1909.08593; Ouyang et al. 2022,
    eq. 2, https://arxiv.org/abs/2203.02155; missing-EOS penalty as in Huang et al. 2024,
    detail 23, https://arxiv.org/abs/2403.17031.

    Args:
        scores: one a sequence, or one a token; reward units.
        log_ratios: log policy - log reference of each token, nats.
        mask: valid response tokens.
        terminated: an EOS ended the response.
        kl_coef: reward units per nat.
        kl_estimator: k1, k2, k3 or your own; None for no penalty here.
        missing_eos_penalty: subtracted at the last valid token of a response without EOS.
        score_clip: scores are first clipped to [-score_clip, score_clip].

    Returns:
        Rewards [B, T], at least float32, 0 where `mask` is false.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("scores", scores, mask.shape[:1], mask.shape)
    check_shape("log_ratios", log_ratios, mask.shape)
    check_shape("terminated", terminated, mask.shape[:1])
    log_ratios = upcast(log_ratios)
    dtype = promote_types(scores.dtype, log_ratios.dtype)
    scores = scores.astype(dtype)
    if score_clip is not None:
        bound = jnp.asarray(score_clip, dtype)
        scores = jnp.clip(scores, -bound, bound)
    at_end = last_valid(mask)
    rewards = jnp.where(at_end, scores[:, None], 0.0) if scores.ndim == 1 else scores
    missing = jnp.where(terminated, 0.0, jnp.asarray(missing_eos_penalty, dtype))
    rewards = rewards - jnp.where(at_end, missing[:, None], 0.0)
    if kl_estimator is not None:
        penalty = kl_estimator(log_ratios).astype(dtype)
        rewards = rewards - jnp.asarray(kl_coef, dtype) * penalty
    return jnp.where(mask, rewards, 0.0)


def last_valid(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last valid token of each row, nowhere in a row without one.

    Args:
        mask: valid tokens; may have holes.

    Returns:
        Same shape, at most one true a row.
    """
    valid_from_here = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=1), axis=1), axis=1)
    return mask & (valid_from_here == 1)


def adaptive_kl_coef(
    kl_coef: Float[Array, ""],
    sequence_kl: Float[Array, ""],
    *,
    target: Scalar,
    horizon: Scalar,
    num_sequences: int,
) -> Float[Array, ""]:
    """One step of the proportional controller of the KL coefficient.

        e = clip(KL / target - 1, -0.2, 0.2);   coef' = coef * (1 + e * min(n / horizon, 1))

    Source: Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593. The minimum
    is ours: beyond five horizons an iteration the factor could be negative. A KL that is not finite
    leaves the coefficient.

    Args:
        kl_coef: the present coefficient.
        sequence_kl: measured KL, nats a sequence.
        target: nats a sequence, > 0.
        horizon: sequences.
        num_sequences: n, sequences of this iteration.

    Returns:
        The next coefficient.
    """
    dtype = kl_coef.dtype
    error = sequence_kl.astype(dtype) / jnp.asarray(target, dtype) - 1.0
    error = jnp.where(jnp.isfinite(error), jnp.clip(error, -0.2, 0.2), 0.0)
    pace = jnp.minimum(num_sequences / jnp.asarray(horizon, dtype), 1.0)
    return kl_coef * (1.0 + error * pace)
