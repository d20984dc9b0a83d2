"""Stage 4, one sequence at a time, by the sum that defines the estimator."""

import numpy as np
from jaxtyping import Bool, Float64


def gae(
    rewards: Float64[np.ndarray, "B T"],
    values: Float64[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    bootstrap_values: Float64[np.ndarray, " B"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float64[np.ndarray, "B T"], Float64[np.ndarray, "B T"]]:
    """(advantages, returns): A_t = sum over k of (gamma lam)^k delta_{t+k}, holes taken out."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        value = [values[b, t] for t in tokens] + [bootstrap_values[b]]
        deltas = [rewards[b, t] + gamma * value[i + 1] - value[i] for i, t in enumerate(tokens)]
        for i, t in enumerate(tokens):
            for k, delta in enumerate(deltas[i:]):
                advantages[b, t] += (gamma * lam) ** k * delta
            returns[b, t] = advantages[b, t] + values[b, t]
    return advantages, returns
