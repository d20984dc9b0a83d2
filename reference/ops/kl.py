"""Estimators of the KL divergence, one log-ratio at a time."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64

LOG_RATIO_LIMIT = 20.0


def _for_each(
    number: Callable[[float], float | bool], x: Float64[np.ndarray, "*shape"], dtype: type
) -> np.ndarray:
    y = np.zeros(x.shape, dtype)
    for place in np.ndindex(x.shape):
        y[place] = number(float(x[place]))
    return y


def _clamp(x: float) -> float:
    if x > LOG_RATIO_LIMIT:
        return LOG_RATIO_LIMIT
    if x < -LOG_RATIO_LIMIT:
        return -LOG_RATIO_LIMIT
    return x


def clamp_log_ratio(x: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """x, or the nearer limit where x is beyond it."""
    return _for_each(_clamp, x, float)


def is_clamped(x: Float64[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Whether x is beyond a limit."""
    return _for_each(lambda number: abs(number) > LOG_RATIO_LIMIT, x, bool)


def k1(log_ratio: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """The log-ratio itself."""
    return _for_each(lambda x: x, log_ratio, float)


def k2(log_ratio: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Half of its square."""
    return _for_each(lambda x: _clamp(x) ** 2 / 2, log_ratio, float)


def k3(log_ratio: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """The Bregman form r - 1 - log r of the ratio r = reference / policy."""
    return _for_each(lambda x: math.exp(-_clamp(x)) - 1 + _clamp(x), log_ratio, float)


def with_gradient_of(value: Callable, gradient: Callable) -> Callable:
    """Without gradients, the value alone."""
    del gradient
    return value
