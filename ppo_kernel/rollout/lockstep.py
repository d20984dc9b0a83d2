"""The decode loop of a whole batch, and what it shares with that of a queue."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..config import GenerationConfig
from ..models.protocol import Cache, DecodeStep
from ..ops.dtypes import promote_types
from ..types import Prompts

Read: TypeAlias = Callable[..., tuple[Float[Array, "B D"], Cache]]
"""(tokens [n, P], mask [n, P]) -> what predicts the first token of n * G rows, and their cache.

It has room for T - 1 decode steps, or for as many as a third argument says."""

Drawn: TypeAlias = tuple[
    Int[Array, " B"], Float[Array, " B"], Float[Array, " B"], Bool[Array, " B"]
]
"""Tokens, log-probabilities under the policy and under what was sampled from, which are an EOS."""

Draw: TypeAlias = Callable[..., Drawn]
"""(hidden [B, D], noise [B, 2], t [B] or rank 0) -> what was drawn as token t of each row."""

Written: TypeAlias = tuple[Array, ...]
"""Tokens, mask and both log-probabilities of responses, [..., T] each."""

_LOOPS = 4
"""For a cache that grows: more loops read fewer empty slots, and take longer to compile."""

_LEAST_STEPS = 64
"""Decode steps: a shorter loop of its own saves less than it takes to compile."""


def decode_batch(
    read: Read,
    draw: Draw,
    step: DecodeStep,
    prompts: Prompts,
    noise: Float[Array, "B T 2"],
    *,
    config: GenerationConfig,
    grow: Callable[[Cache, int], Cache] | None,
) -> Written:
    """Draw and step the whole batch until every row has ended.

    The first token comes from the prefill, and the last one is never read. With `grow` long
    responses are decoded in up to four loops, each with a cache that has room up to its own end,
    so that attention reads few slots that are not written yet.

    Args:
        read, draw, step: see `Read`, `Draw`, `DecodeStep`.
        prompts: N of them.
        noise: uniforms in [0, 1).
        config: what the slots after an EOS hold.
        grow: see `Decoder`.

    Returns:
        The responses, [B, T] each.
    """
    rows, length, _ = noise.shape
    ends = rooms_of_loops(length, growing=grow is not None)

    def write(hidden, t, done, written):
        tokens, logprobs, behaviour, is_eos = draw(hidden, noise[:, t], t)
        entry = (tokens, ~done, logprobs, behaviour)
        empties = (config.pad_token_id, False, 0.0, 0.0)
        written = tuple(
            buffer.at[:, t].set(jnp.where(done, jnp.asarray(empty, buffer.dtype), value))
            for buffer, value, empty in zip(written, entry, empties, strict=True)
        )
        return tokens, done | is_eos, written

    def one_token(carry):
        t, tokens, cache, done, written = carry
        hidden, cache = step(tokens, cache)
        tokens, done, written = write(hidden, t, done, written)
        return t + 1, tokens, cache, done, written

    def unfinished(carry, end: int):
        t, _, _, done, _ = carry
        return (t <= end) & ~jnp.all(done)

    hidden, cache = read(prompts.tokens, prompts.mask, ends[0])
    written = blank((rows, length), hidden.dtype, config.pad_token_id)
    first = write(hidden, jnp.zeros((), jnp.int32), jnp.zeros(rows, bool), written)
    tokens, done, written = first
    t = jnp.ones((), jnp.int32)
    for index, end in enumerate(ends):
        if grow is not None and index:
            cache = grow(cache, prompts.tokens.shape[1] + end)
        t, tokens, cache, done, written = jax.lax.while_loop(
            partial(unfinished, end=end), one_token, (t, tokens, cache, done, written)
        )
    return written


def rooms_of_loops(length: int, growing: bool) -> list[int]:
    """Decode steps that the cache has room for in each of the loops, one after the other.

    Args:
        length: T; the first token comes from the prefill, and the last one is never read.
        growing: whether the cache can be given more room.

    Returns:
        T - 1 at the last, which may be 0.
    """
    loops = min(_LOOPS, max(1, length // _LEAST_STEPS)) if growing else 1
    return [(length - 1) * n // loops for n in range(1, loops + 1)]


def blank(shape: tuple[int, ...], dtype: jnp.dtype, pad_token_id: int) -> Written:
    """Responses of which nothing is written.

    Args:
        shape: of each array; the last axis is T.
        dtype: of the log-probabilities, at least float32.
        pad_token_id: what the tokens hold.

    Returns:
        Tokens, a mask that is false, and zeros for both log-probabilities.
    """
    dtype = promote_types(dtype, jnp.float32)
    return (
        jnp.full(shape, pad_token_id, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
    )
