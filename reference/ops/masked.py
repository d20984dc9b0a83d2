"""Masked reductions, one place at a time."""

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
