"""Derivatives of the terms of the loss, one token at a time."""

import math

import numpy as np
from jaxtyping import Float64

from .ops.kl import LOG_RATIO_LIMIT


def policy_loss_slope(
    logprob: float,
    old_logprob: float,
    advantage: float,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float | None,
) -> float:
    """d(-A rho)/d logprob = -A rho, and 0 where a clip has made the loss constant.

    An advantage that is not finite has no slope, wherever the ratio is.
    """
    if not math.isfinite(advantage):
        return math.nan
    if abs(logprob - old_logprob) > LOG_RATIO_LIMIT:
        return 0.0
    ratio = math.exp(logprob - old_logprob)
    if advantage >= 0:
        flat = ratio > 1 + clip_ratio_high
    else:
        flat = ratio < 1 - clip_ratio_low or (dual_clip is not None and ratio > dual_clip)
    return 0.0 if flat else -advantage * ratio


def value_loss_slope(
    value: float, old_value: float, target: float, *, value_clip: float | None
) -> float:
    """d((V - R)^2 / 2)/dV = V - R, and 0 where the clipped value is the worse one."""
    if value_clip is not None and abs(value - old_value) > value_clip:
        near = old_value + math.copysign(value_clip, value - old_value)
        if (near - target) ** 2 > (value - target) ** 2:
            return 0.0
    return value - target


def k1_slope(log_ratio: float) -> float:
    """dx/dx."""
    del log_ratio
    return 1.0


def k2_slope(log_ratio: float) -> float:
    """d(x^2 / 2)/dx, and 0 beyond the limit."""
    return log_ratio if abs(log_ratio) <= LOG_RATIO_LIMIT else 0.0


def k3_slope(log_ratio: float) -> float:
    """d(exp(-x) - 1 + x)/dx, and 0 beyond the limit."""
    return 1 - math.exp(-log_ratio) if abs(log_ratio) <= LOG_RATIO_LIMIT else 0.0


def logprob_slope(
    probabilities: Float64[np.ndarray, " V"], token: int
) -> Float64[np.ndarray, " V"]:
    """d log p_token / dz_v = [v = token] - p_v, with z the tempered logits."""
    slope = -probabilities
    slope[token] += 1
    return slope


def entropy_slope(probabilities: Float64[np.ndarray, " V"]) -> Float64[np.ndarray, " V"]:
    """dH / dz_v = -p_v (log p_v + H), with z the tempered logits."""
    entropy = -(probabilities * np.log(probabilities)).sum()
    return -probabilities * (np.log(probabilities) + entropy)
