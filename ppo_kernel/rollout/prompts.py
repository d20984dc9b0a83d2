"""Refusal of prompts that would give a wrong rollout without a word."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from ..models.protocol import Policy, vocabulary_size
from ..ops.checks import check_shape
from ..types import Prompts


def check_prompts(prompts: Prompts, policy: Policy, *, stacked: bool = False) -> None:
    """Refuse prompts of wrong shapes and types, and wrong values where these are known.

    Values that are traced, or on another host, are counted by `metrics.prompt_counts` instead.

    Args:
        prompts: arrays [N, P] and [N].
        policy: its vocabulary is that of the ids.
        stacked: the arrays are [S, N, P] and [S, N], for S iterations.

    Raises:
        ValueError: wrong shapes or types; a prompt with a gap or with padding on the right; an id
            outside the vocabulary; two equal sample ids in a batch.
    """
    tokens, mask, sample_ids = prompts.tokens, prompts.mask, prompts.sample_ids
    if stacked and tokens.ndim != 3:
        raise ValueError(
            f"steps takes batches of prompts stacked to [S, N, P], got {tokens.shape}; "
            "stack them with jax.tree.map(lambda *xs: jnp.stack(xs), *batches), or call step."
        )
    if tokens.ndim != 2 + stacked or not tokens.size:
        raise ValueError(
            f"prompts.tokens must be [N, P], one prompt and one slot at least; got {tokens.shape}."
        )
    check_shape("prompts.mask", mask, tokens.shape)
    check_shape("prompts.sample_ids", sample_ids, tokens.shape[:-1])
    kinds = {"tokens": jnp.integer, "mask": bool, "sample_ids": jnp.integer}
    for (name, kind), x in zip(kinds.items(), (tokens, mask, sample_ids), strict=True):
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"prompts.{name} must be of type {kind.__name__}, got {x.dtype}.")
    if all(_is_known(x) for x in (tokens, mask, sample_ids)):
        size = vocabulary_size(policy)
        _check_values(np.asarray(tokens), np.asarray(mask), np.asarray(sample_ids), size)


def _is_known(x: Array | np.ndarray) -> bool:
    return not isinstance(x, Tracer) and (isinstance(x, np.ndarray) or x.is_fully_addressable)


def _check_values(
    tokens: Int[np.ndarray, "*steps N P"],
    mask: Bool[np.ndarray, "*steps N P"],
    sample_ids: Int[np.ndarray, "*steps N"],
    size: int,
) -> None:
    misplaced = np.any(mask[..., :-1] & ~mask[..., 1:], axis=-1)
    if misplaced.any():
        raise ValueError(
            f"prompts.mask of prompt {_first(misplaced)} has a gap, or padding on the right; "
            "prompts are left-padded: Prompts.from_ids(lists) makes such ones."
        )
    outside = mask & ((tokens < 0) | (tokens >= size))
    if outside.any():
        place = np.unravel_index(outside.argmax(), outside.shape)
        raise ValueError(
            f"prompts.tokens of prompt {place[-2]} has id {tokens[place]}, outside of the policy's "
            f"vocabulary of {size} tokens; encode text with the policy's own tokenizer."
        )
    ordered = np.sort(sample_ids, axis=-1)
    repeated = ordered[..., 1:] == ordered[..., :-1]
    if repeated.any():
        raise ValueError(
            f"prompts.sample_ids has {ordered[..., 1:][repeated][0]} more than once; equal ids "
            "share their noise, so number the prompts of a batch: jnp.arange(N)."
        )


def _first(rows: Bool[np.ndarray, "*steps N"]) -> int:
    return int(np.unravel_index(rows.argmax(), rows.shape)[-1])
