"""Causal attention over whole sequences, in blocks of queries."""

from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .softmax_attention import attend, plain_attend

_BLOCKS = (4, 48), (8, 128)
"""(most blocks, fewest queries per block): narrower blocks skip less work than their products lose
in speed, and more blocks take longer to compile (bench/TRIED.md)."""


def plain_attend_causally(
    query: Float[Array, "B K group S E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    mask: Bool[Array, "B S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B K group S E"]:
    """`plain_attend` over the whole square [S, S]; see `attend_causally`."""
    length = mask.shape[1]
    allowed = jnp.tril(jnp.ones((length, length), bool))[None] & mask[:, None]
    if window is not None:
        positions = positions_of(mask)
        allowed &= positions[:, :, None] - positions[:, None] < window
    return plain_attend(query, key, value, allowed, scale=scale, softcap=softcap)


def attend_causally(
    query: Float[Array, "B K group S E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    mask: Bool[Array, "B S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B K group S E"]:
    """`attend`, where each slot sees the valid slots up to and with itself.

    Each block of queries meets the keys up to its own end alone: with four blocks 3/8 of the square
    [S, S] is never computed, with eight 7/16. A window is masked: holes in `mask` may push the
    tokens of a window any number of slots apart.

    Args:
        query, key, value: as in `attend`, of the same S slots.
        mask: which slots hold a token.
        scale, softcap: as in `attend`.
        window: a token sees this many tokens, itself the last; None for all before it.

    Returns:
        The mixed values, shape of `query`.
    """
    # Once for all blocks: each would transpose its own part of the projections.
    query, key, value = jax.lax.optimization_barrier((query, key, value))
    length = mask.shape[1]
    blocks = max(1, *(min(most, length // queries) for most, queries in _BLOCKS))
    bounds = [length * n // blocks for n in range(blocks + 1)]
    causal = jnp.tril(jnp.ones((length, length), bool))
    positions = positions_of(mask)
    mixed = []
    for start, end in pairwise(bounds):
        allowed = causal[None, start:end, :end] & mask[:, None, :end]
        if window is not None:
            allowed &= positions[:, start:end, None] - positions[:, None, :end] < window
        mixed.append(
            attend(
                query[:, :, :, start:end], key[:, :, :end], value[:, :, :end], allowed,
                scale=scale, softcap=softcap,
            )
        )  # fmt: skip
    return mixed[0] if blocks == 1 else jnp.concatenate(mixed, axis=3)


def positions_of(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of each token: the number of tokens before it."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
