"""Stage 5a, one token at a time, case by case."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64


def _ratio(logprob: float, old_logprob: float) -> float:
    return math.exp(min(max(logprob - old_logprob, -20.0), 20.0))


def clipped_policy_loss(
    logprobs: Float64[np.ndarray, "*shape"],
    old_logprobs: Float64[np.ndarray, "*shape"],
    advantages: Float64[np.ndarray, "*shape"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float | None = None,
) -> Float64[np.ndarray, "*shape"]:
    """A good token gains up to ratio 1 + high, a bad one down to 1 - low (and up to dual_clip)."""
    loss = np.zeros(logprobs.shape)
    for place in np.ndindex(logprobs.shape):
        ratio, advantage = (
            _ratio(float(logprobs[place]), float(old_logprobs[place])),
            advantages[place],
        )
        if advantage >= 0:
            ratio = min(ratio, 1 + clip_ratio_high)
        else:
            ratio = max(ratio, 1 - clip_ratio_low)
            if dual_clip is not None:
                ratio = min(ratio, dual_clip)
        loss[place] = -advantage * ratio
    return loss


def is_clipped(
    logprobs: Float64[np.ndarray, "*shape"],
    old_logprobs: Float64[np.ndarray, "*shape"],
    advantages: Float64[np.ndarray, "*shape"],
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Bool[np.ndarray, "*shape"]:
    """Whether the clip changed the ratio that the loss uses."""
    clipped = np.zeros(logprobs.shape, bool)
    for place in np.ndindex(logprobs.shape):
        ratio = _ratio(float(logprobs[place]), float(old_logprobs[place]))
        if advantages[place] > 0:
            clipped[place] = ratio > 1 + clip_ratio_high
        if advantages[place] < 0:
            clipped[place] = ratio < 1 - clip_ratio_low
    return clipped


def clipped_value_loss(
    values: Float64[np.ndarray, "*shape"],
    old_values: Float64[np.ndarray, "*shape"],
    returns: Float64[np.ndarray, "*shape"],
    *,
    value_clip: float | None = None,
) -> Float64[np.ndarray, "*shape"]:
    """Half the squared error; of the value kept near its old one, if that is more."""
    loss = np.zeros(values.shape)
    for place in np.ndindex(values.shape):
        value, old, target = values[place], old_values[place], returns[place]
        loss[place] = (value - target) ** 2 / 2
        if value_clip is not None:
            near = np.minimum(np.maximum(value, old - value_clip), old + value_clip)
            loss[place] = np.maximum(loss[place], (near - target) ** 2 / 2)
    return loss


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
