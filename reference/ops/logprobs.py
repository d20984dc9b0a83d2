"""Log-probabilities and entropies, one distribution at a time."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int


def _log_softmax(z: Float64[np.ndarray, " V"]) -> Float64[np.ndarray, " V"]:
    """log p_v; the largest logit is taken out first so that exp cannot overflow."""
    largest = max(float(logit) for logit in z)
    total = sum(math.exp(float(logit) - largest) for logit in z)
    return np.array([float(logit) - largest - math.log(total) for logit in z])


def token_logprobs(
    logits: Float64[np.ndarray, "*batch V"], tokens: Int[np.ndarray, "*batch"]
) -> Float64[np.ndarray, "*batch"]:
    """log p of each token."""
    logprobs = np.zeros(tokens.shape)
    for place in np.ndindex(tokens.shape):
        logprobs[place] = _log_softmax(logits[place])[tokens[place]]
    return logprobs


def entropy(logits: Float64[np.ndarray, "*batch V"]) -> Float64[np.ndarray, "*batch"]:
    """-sum p log p over the tokens that can occur."""
    entropies = np.zeros(logits.shape[:-1])
    for place in np.ndindex(entropies.shape):
        logp = _log_softmax(logits[place])
        entropies[place] = -sum(math.exp(lp) * lp for lp in logp if lp != -math.inf)
    return entropies


def logprobs_from_hidden(
    hidden: Float64[np.ndarray, "B T D"],
    tokens: Int[np.ndarray, "B T"],
    unembed: Callable[[Float64[np.ndarray, "C D"]], Float64[np.ndarray, "C V"]],
    *,
    temperature: float,
    chunk_size: int | None = None,
) -> tuple[Float64[np.ndarray, "B T"], Float64[np.ndarray, "B T"]]:
    """(log p of each token, entropy), one position through the output head at a time."""
    del chunk_size
    logprobs, entropies = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for place in np.ndindex(tokens.shape):
        logits = unembed(hidden[place][None])[0] / temperature
        logprobs[place] = _log_softmax(logits)[tokens[place]]
        entropies[place] = entropy(logits)
    return logprobs, entropies
