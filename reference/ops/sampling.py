"""Restriction and inverse-CDF sampling, one row at a time. The noise comes from outside."""

import math

import numpy as np
from jaxtyping import Float64, Int

BLOCK = 256


def restrict_logits(
    logits: Float64[np.ndarray, "B V"],
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float64[np.ndarray, "B V"]:
    """Ban what top-k, then top-p, then min-p leave out; equal logits share their fate."""
    restricted = logits.copy()
    for row in restricted:
        if top_k is not None:
            _keep_k_largest(row, top_k)
        if top_p is not None:
            _keep_nucleus(row, top_p)
        if min_p is not None:
            _keep_likely(row, min_p)
    return restricted


def _probabilities(row: Float64[np.ndarray, " V"]) -> Float64[np.ndarray, " V"]:
    largest = max(row)
    weights = [math.exp(logit - largest) for logit in row]
    total = sum(weights)
    return np.array([w / total for w in weights])


def _keep_k_largest(row: Float64[np.ndarray, " V"], k: int) -> None:
    """A token stays if fewer than k others are more likely."""
    before = row.copy()
    for i, logit in enumerate(before):
        if sum(other > logit for other in before) >= k:
            row[i] = -np.inf


def _keep_nucleus(row: Float64[np.ndarray, " V"], p: float) -> None:
    """A token stays if all the more likely ones together have not reached the mass p."""
    if p >= 1:
        return
    before, mass = row.copy(), _probabilities(row)
    for i, logit in enumerate(before):
        if logit < max(before) and _mass_above(logit, before, mass) >= p:
            row[i] = -np.inf


def _mass_above(
    logit: float, row: Float64[np.ndarray, " V"], mass: Float64[np.ndarray, " V"]
) -> float:
    return sum(float(m) for m, other in zip(mass, row, strict=True) if other > logit)


def _keep_likely(row: Float64[np.ndarray, " V"], fraction: float) -> None:
    """A token stays if it has that fraction of the largest probability."""
    mass = _probabilities(row)
    for i, m in enumerate(mass):
        if m < fraction * max(mass):
            row[i] = -np.inf


def ban_tokens(
    logits: Float64[np.ndarray, "B V"], token_ids: tuple[int, ...], where: bool
) -> Float64[np.ndarray, "B V"]:
    """Ban the given ids in every row, or do nothing."""
    banned = logits.copy()
    if where:
        for row in banned:
            for i in token_ids:
                row[i] = -np.inf
    return banned


def sample_tokens(
    logits: Float64[np.ndarray, "B V"], noise: Float64[np.ndarray, "B 2"]
) -> tuple[Int[np.ndarray, " B"], Float64[np.ndarray, " B"]]:
    """(tokens, log p): walk over blocks of the vocabulary, then over the chosen block."""
    tokens, logprobs = np.zeros(len(logits), int), np.zeros(len(logits))
    for b, row in enumerate(logits):
        mass = _probabilities(row)
        starts = range(0, len(row), BLOCK)
        start = starts[_walk(np.array([sum(mass[i : i + BLOCK]) for i in starts]), noise[b, 0])]
        tokens[b] = start + _walk(mass[start : start + BLOCK], noise[b, 1])
        logprobs[b] = math.log(mass[tokens[b]])
    return tokens, logprobs


def _walk(mass: Float64[np.ndarray, " X"], uniform: float) -> int:
    """The first entry whose running sum exceeds that share of the whole."""
    share, running = uniform * sum(mass), 0.0
    for i, m in enumerate(mass):
        running += m
        if m > 0 and running > share:
            return i
    raise ValueError(f"No entry of {mass} is beyond {uniform} of the sum.")
