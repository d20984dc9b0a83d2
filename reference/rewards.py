"""Stage 3, one sequence at a time."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64


def token_rewards(
    scores: Float64[np.ndarray, " B"] | Float64[np.ndarray, "B T"],
    log_ratios: Float64[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    terminated: Bool[np.ndarray, " B"],
    *,
    kl_coef: float,
    kl_estimator: Callable | None,
    missing_eos_penalty: float = 0.0,
    score_clip: float | None = None,
) -> Float64[np.ndarray, "B T"]:
    """Each valid token pays for its KL; the last one (or each, if so scored) gets the score."""
    limit = math.inf if score_clip is None else score_clip
    rewards = np.zeros(mask.shape)
    for b in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        for t in tokens:
            if scores.ndim == 2:
                rewards[b, t] += min(max(scores[b, t], -limit), limit)
            if kl_estimator is not None:
                rewards[b, t] -= kl_coef * kl_estimator(log_ratios[b, t : t + 1])[0]
        if tokens and scores.ndim == 1:
            rewards[b, tokens[-1]] += min(max(scores[b], -limit), limit)
        if tokens and not terminated[b]:
            rewards[b, tokens[-1]] -= missing_eos_penalty
    return rewards


def last_valid(mask: Bool[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Mark the last valid token of each sequence that has one."""
    marks = np.zeros(mask.shape, bool)
    for b in range(len(mask)):
        for t in reversed(range(mask.shape[1])):
            if mask[b, t]:
                marks[b, t] = True
                break
    return marks


def adaptive_kl_coef(
    kl_coef: Float64[np.ndarray, ""],
    sequence_kl: Float64[np.ndarray, ""],
    *,
    target: float,
    horizon: float,
    num_sequences: int,
) -> float:
    """Grow the coefficient where the KL is above its target, shrink it where it is below."""
    if not math.isfinite(sequence_kl):
        return float(kl_coef)
    error = (float(sequence_kl) - target) / target
    error = min(max(error, -0.2), 0.2)
    return float(kl_coef) * (1 + error * min(num_sequences / horizon, 1.0))
