"""The decode loop of a whole batch: all rows take token t together."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..models.protocol import Cache
from .decoding import Decoding, Responses, cache_capacities, empty_responses


class _State(NamedTuple):
    """`tokens` were sampled last and are not read yet; `t` is the index of the next ones."""

    t: Int[Array, ""]
    tokens: Int[Array, " B"]
    cache: Cache
    done: Bool[Array, " B"]
    responses: Responses


def decode_batch(decoding: Decoding) -> Responses:
    """Sample and step the whole batch until every row has ended.

    With `grow`, long responses are decoded in up to four loops. Each has a cache with slots up to
    its own last step, so that attention reads few empty slots.

    Args:
        decoding: see `Decoding`.

    Returns:
        The responses, arrays [B, T].
    """
    tokens, mask = decoding.prompts.tokens, decoding.prompts.mask
    rows, length, _ = decoding.noise.shape
    width, grow = tokens.shape[1], decoding.grow
    capacities = cache_capacities(width, length, growing=grow is not None)

    def one_token(state: _State) -> _State:
        hidden, cache = decoding.step(state.tokens, state.cache)
        return _sample(decoding, state._replace(cache=cache), hidden)

    def unfinished(state: _State, last: int) -> Bool[Array, ""]:
        return (state.t <= last) & ~jnp.all(state.done)

    hidden, cache = decoding.prefill(tokens, mask, capacities[0])
    state = _State(
        t=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros(rows, jnp.int32),
        cache=cache,
        done=jnp.zeros(rows, bool),
        responses=empty_responses((rows, length), hidden.dtype, decoding.config.pad_token_id),
    )
    state = _sample(decoding, state, hidden)
    for index, capacity in enumerate(capacities):
        if grow is not None and index:
            state = state._replace(cache=grow(state.cache, capacity))
        state = jax.lax.while_loop(partial(unfinished, last=capacity - width), one_token, state)
    return state.responses


def _sample(decoding: Decoding, state: _State, hidden: Float[Array, "B D"]) -> _State:
    """Sample token t of every row, and write it where the row has not ended."""
    t, done = state.t, state.done
    sampled = decoding.sample(hidden, decoding.noise[:, t], t)
    entry = Responses(sampled.tokens, ~done, sampled.logprobs, sampled.behaviour_logprobs)
    empty = empty_responses((1,), hidden.dtype, decoding.config.pad_token_id)

    def write(buffer: Array, value: Array, empty: Array) -> Array:
        return buffer.at[:, t].set(jnp.where(done, empty, value))

    return state._replace(
        t=t + 1,
        tokens=sampled.tokens,
        done=done | sampled.is_eos,
        responses=jax.tree.map(write, state.responses, entry, empty),
    )
