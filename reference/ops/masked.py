"""Masked reductions, one place at a time."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64


def masked_sum(x: Float64[np.ndarray, "*shape"], mask: Bool[np.ndarray, "*shape"]) -> float:
    """Add up the places that count."""
    total = 0.0
    for place in np.ndindex(x.shape):
        if mask[place]:
            total += x[place]
    return float(total)


def masked_mean(x: Float64[np.ndarray, "*shape"], mask: Bool[np.ndarray, "*shape"]) -> float:
    """Their average; 0 if there are none."""
    count = sum(1 for place in np.ndindex(x.shape) if mask[place])
    return masked_sum(x, mask) / count if count else 0.0


def whiten(
    x: Float64[np.ndarray, "*shape"], mask: Bool[np.ndarray, "*shape"], *, epsilon: float = 1e-8
) -> Float64[np.ndarray, "*shape"]:
    """Shift and scale the places that count to mean 0 and variance 1 (divisor n)."""
    valid = [x[place] for place in np.ndindex(x.shape) if mask[place]]
    y = np.zeros(x.shape)
    if not valid:
        return y
    mean = sum(valid) / len(valid)
    variance = sum((v - mean) ** 2 for v in valid) / len(valid)
    for place in np.ndindex(x.shape):
        if mask[place]:
            y[place] = (x[place] - mean) / (variance + epsilon) ** 0.5
    return y


def token_mean(mask: Bool[np.ndarray, "M T"]) -> Float64[np.ndarray, "M T"]:
    """Each of the n valid tokens weighs 1 / n."""
    n = int(mask.sum())
    weights = np.zeros(mask.shape)
    for place in np.ndindex(mask.shape):
        if mask[place]:
            weights[place] = 1 / n
    return weights


def sequence_mean(mask: Bool[np.ndarray, "M T"]) -> Float64[np.ndarray, "M T"]:
    """Each of the m sequences with tokens weighs 1 / m, shared evenly among its tokens."""
    sequences = [i for i in range(mask.shape[0]) if mask[i].any()]
    weights = np.zeros(mask.shape)
    for i in sequences:
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in tokens:
            weights[i, t] = 1 / len(tokens) / len(sequences)
    return weights


def fixed_mean(
    tokens_per_sequence: int,
) -> Callable[[Bool[np.ndarray, "M T"]], Float64[np.ndarray, "M T"]]:
    """Each valid token weighs one over all the slots there could be."""

    def reduction(mask: Bool[np.ndarray, "M T"]) -> Float64[np.ndarray, "M T"]:
        weights = np.zeros(mask.shape)
        for place in np.ndindex(mask.shape):
            if mask[place]:
                weights[place] = 1 / (len(mask) * tokens_per_sequence)
        return weights

    return reduction
