"""Grouped-query attention of one sequence, one head at a time, and its derivative."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from .layers import linear, linear_backward, rms_norm, rms_norm_backward, rotate


class Sequence(NamedTuple):
    """Where the tokens of a sequence stand: which slots are filled, and their positions."""

    mask: Bool[np.ndarray, " S"]
    positions: Int[np.ndarray, " S"]
    frequencies: Float64[np.ndarray, " half"]


def attention(
    x: Float64[np.ndarray, "S D"], parameters: dict, config, sequence: Sequence
) -> Float64[np.ndarray, "S D"]:
    """softmax(q k^T / sqrt(E)) v for every head, side by side, then the output matrix."""
    query, key, value = _project(x, parameters, config, sequence)
    return linear(_mix(query, key, value, sequence.mask), parameters["output"])


def attention_backward(
    gradient: Float64[np.ndarray, "S D"],
    x: Float64[np.ndarray, "S D"],
    parameters: dict,
    config,
    sequence: Sequence,
) -> tuple[Float64[np.ndarray, "S D"], dict]:
    """Backwards through the output matrix, the mixing, the rotation, the norms, the projections."""
    query, key, value = _project(x, parameters, config, sequence)
    mixed, gradients = _mix(query, key, value, sequence.mask), {}
    mixed_gradient, gradients["output"] = linear_backward(gradient, mixed, parameters["output"])
    by_head = dict(
        zip(
            ("query", "key", "value"),
            _mix_backward(mixed_gradient, query, key, value, sequence.mask),
            strict=True,
        )
    )
    dx = np.zeros_like(x)
    for name, head_gradient in by_head.items():
        norm = f"{name}_norm"
        if name != "value":
            head_gradient = rotate(head_gradient, -sequence.positions, sequence.frequencies)
            gradients[norm] = None
            if parameters[norm] is not None:
                projected = _heads(linear(x, parameters[name]), config)
                head_gradient, gradients[norm] = rms_norm_backward(
                    head_gradient, projected, parameters[norm], config.norm_epsilon
                )
        rows = head_gradient.reshape(len(x), -1)
        part, gradients[name] = linear_backward(rows, x, parameters[name])
        dx += part
    return dx, gradients


def _heads(x: Float64[np.ndarray, "S width"], config) -> Float64[np.ndarray, "S X E"]:
    return x.reshape(len(x), -1, config.head_dim)


def _project(
    x: Float64[np.ndarray, "S D"], parameters: dict, config, sequence: Sequence
) -> list[Float64[np.ndarray, "S X E"]]:
    """[queries, keys, values] of every slot; queries and keys normed, then rotated."""
    projected = []
    for name in ("query", "key", "value"):
        heads = _heads(linear(x, parameters[name]), config)
        if name != "value":
            if parameters[f"{name}_norm"] is not None:
                heads = rms_norm(heads, parameters[f"{name}_norm"], config.norm_epsilon)
            heads = rotate(heads, sequence.positions, sequence.frequencies)
        projected.append(heads)
    return projected


def _weights(
    query: Float64[np.ndarray, "S E"],
    key: Float64[np.ndarray, "S E"],
    mask: Bool[np.ndarray, " S"],
) -> Float64[np.ndarray, "S S"]:
    """How much slot i reads of slot j: only filled ones, none after i; nothing if there is none."""
    size, width = query.shape
    weights = np.zeros((size, size))
    for i in range(size):
        seen = [j for j in range(i + 1) if mask[j]]
        if seen:
            logits = key[seen] @ query[i] / width**0.5
            unnormalised = np.exp(logits - logits.max())
            weights[i, seen] = unnormalised / unnormalised.sum()
    return weights


def _mix(
    query: Float64[np.ndarray, "S H E"],
    key: Float64[np.ndarray, "S K E"],
    value: Float64[np.ndarray, "S K E"],
    mask: Bool[np.ndarray, " S"],
) -> Float64[np.ndarray, "S width"]:
    """Query head h reads key/value head h // (H / K)."""
    group = query.shape[1] // key.shape[1]
    heads = [
        _weights(query[:, h], key[:, h // group], mask) @ value[:, h // group]
        for h in range(query.shape[1])
    ]
    return np.concatenate(heads, axis=1)


def _mix_backward(
    gradient: Float64[np.ndarray, "S width"],
    query: Float64[np.ndarray, "S H E"],
    key: Float64[np.ndarray, "S K E"],
    value: Float64[np.ndarray, "S K E"],
    mask: Bool[np.ndarray, " S"],
) -> tuple[
    Float64[np.ndarray, "S H E"], Float64[np.ndarray, "S K E"], Float64[np.ndarray, "S K E"]
]:
    """With a = softmax(z):  dz_j = a_j (da_j - sum_i a_i da_i),  z_j = q . k_j / sqrt(E)."""
    width, group = query.shape[2], query.shape[1] // key.shape[1]
    dquery, dkey, dvalue = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    for h in range(query.shape[1]):
        shared, upstream = h // group, gradient[:, h * width : (h + 1) * width]
        weights = _weights(query[:, h], key[:, shared], mask)
        dweights = upstream @ value[:, shared].T
        dlogits = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
        dquery[:, h] = dlogits @ key[:, shared] / width**0.5
        dkey[:, shared] += dlogits.T @ query[:, h] / width**0.5
        dvalue[:, shared] += weights.T @ upstream
    return dquery, dkey, dvalue
