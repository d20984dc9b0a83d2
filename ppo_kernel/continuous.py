"""A decode loop with a queue: a slot whose sequence has ended takes the next one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .config import GenerationConfig
from .models.base import Cache, Decoder
from .ops.masked import wider_type
from .types import Prompts

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

_REFILLS = 8
"""Slots over those of a refill: fewer refills keep more slots waiting, more move few rows."""


def decode_queue(
    read: Read,
    draw: Draw,
    step: Decoder,
    prompts: Prompts,
    noise: Float[Array, "B T 2"],
    *,
    config: GenerationConfig,
    grow: Callable[[Cache, int], Cache] | None,
    queues: int = 1,
) -> Written:
    """Draw and step C sequences at a time until all B have ended.

    Prompts are read ahead, enough for all slots together and each once for its G samples, and their
    first tokens drawn; what is read waits beside the slots. Slots wait until there is room for a
    few sequences, which then are moved in. All rows step together, whatever their t. Every queue
    has its own part of the prompts and of the slots, so that one on a device never asks another.

    Args:
        read, draw, step: see `Read`, `Draw`, `Decoder`.
        prompts: N of them, in the order in which they are taken.
        noise: uniforms in [0, 1).
        config: lengths, samples per prompt, and C = `decode_slots`.
        grow: see `GrowingPolicy`: what is read ahead then has room for the prompt alone.
        queues: Q.

    Returns:
        The responses, [B, T] each.

    Raises:
        ValueError: slots or prompts do not divide over the queues.
    """
    slots, samples, count = config.decode_slots, config.samples_per_prompt, len(prompts.tokens)
    if slots is None or slots % (queues * samples) or count % queues:
        raise ValueError(
            f"decode_slots={slots} must be a multiple of samples_per_prompt={samples} * "
            f"{queues} queues (one a device), and the {count} prompts a multiple of {queues}."
        )
    here = slots // queues
    queue = _Queue(
        read, draw, step, grow,
        tokens=_split(prompts.tokens, queues), mask=_split(prompts.mask, queues),
        noise=_split(noise, queues), config=config, slots=here, chunk=refill_size(here),
    )  # fmt: skip
    state = jax.lax.while_loop(
        lambda state: jnp.any(queue.waiting(state) > 0),
        lambda state: jax.lax.while_loop(queue.has_read, queue.refill, queue.read_ahead(state)),
        queue.idle(),
    )
    return jax.tree.map(_merge, state.written)


def refill_size(slots: int) -> int:
    """Sequences that are moved into `slots` slots together."""
    return max(1, slots // _REFILLS)


def blank(shape: tuple[int, ...], dtype: jnp.dtype, pad_token_id: int) -> Written:
    """Responses of which nothing is written.

    Args:
        shape: of each array; the last axis is T.
        dtype: of the log-probabilities, at least float32.
        pad_token_id: what the tokens hold.
    """
    dtype = wider_type(dtype, jnp.float32)
    return (
        jnp.full(shape, pad_token_id, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
    )


class _Ahead(eqx.Module):
    """Sequences of each of Q queues of which the prompt is read and the first token drawn.

    `start` is the place in the queue of the first of A, `active` says which have not ended.
    """

    cache: Cache
    tokens: Int[Array, "Q A"]
    active: Bool[Array, "Q A"]
    start: Int[Array, " Q"]


class _Slots(eqx.Module):
    """What each of C slots of each of Q queues is doing.

    `tokens` were drawn last and are not read yet, `sequences` are places in the queue, `t` is the
    index of the next token, `taken` counts the sequences that have left the queue.
    """

    cache: Cache
    tokens: Int[Array, "Q C"]
    sequences: Int[Array, "Q C"]
    t: Int[Array, "Q C"]
    active: Bool[Array, "Q C"]
    taken: Int[Array, " Q"]
    ahead: _Ahead
    written: Written


@dataclass(frozen=True)
class _Queue:
    """What waits, and how it is read, drawn and decoded; `chunk` sequences make a refill."""

    read: Read
    draw: Draw
    step: Decoder
    grow: Callable[[Cache, int], Cache] | None
    tokens: Int[Array, "Q N P"]
    mask: Bool[Array, "Q N P"]
    noise: Float[Array, "Q B T 2"]
    config: GenerationConfig
    slots: int
    chunk: int

    def idle(self) -> _Slots:
        """Nothing read yet. Of the caches that are read here only the rank-0 leaves are kept."""
        queues, rows, length, _ = self.noise.shape
        one = _merge(self.tokens[:, :1]), _merge(self.mask[:, :1])
        hidden, cache = self.read(*one)

        def empty(cache: Cache, rows: int) -> Cache:
            def zeros(x: Array) -> Array:
                return jnp.zeros((queues * rows, *x.shape[1:]), x.dtype) if x.ndim else x

            return jax.tree.map(zeros, cache)

        zeros, none = jnp.zeros((queues, self.slots), jnp.int32), jnp.zeros(queues, jnp.int32)
        ahead = _Ahead(empty(self._read(*one)[1], self.slots), zeros, zeros > 0, none - self.slots)
        return _Slots(
            cache=empty(cache, self.slots), tokens=zeros, sequences=zeros, t=zeros,
            active=zeros > 0, taken=none, ahead=ahead,
            written=blank((queues, rows, length), hidden.dtype, self.config.pad_token_id),
        )  # fmt: skip

    def waiting(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences that have not been taken."""
        return self.noise.shape[1] - state.taken

    def has_read(self, state: _Slots) -> Bool[Array, ""]:
        """Whether some queue is not empty, and none of those has nothing read ahead."""
        waits = self.waiting(state) > 0
        return jnp.any(waits) & ~jnp.any(waits & (self._left(state) == 0))

    def read_ahead(self, state: _Slots) -> _Slots:
        """Read the next prompts of every queue that has none ahead; draw their first tokens."""
        samples, ahead = self.config.samples_per_prompt, state.ahead
        none = self._left(state) == 0
        place = jnp.arange(self.slots, dtype=jnp.int32)[None]
        prompt = state.taken[:, None] // samples + place[:, : self.slots // samples]
        hidden, fresh = self._read(
            _merge(_take(self.tokens, prompt)), _merge(_take(self.mask, prompt))
        )
        sequences = state.taken[:, None] + place
        reads = none[:, None] & (sequences < self.noise.shape[1])
        tokens, active, written = self._write(
            hidden, sequences, jnp.zeros_like(sequences), reads, state.written
        )

        def chosen(new: Array, old: Array) -> Array:
            rows = jnp.repeat(none, len(new) // len(none)) if new.ndim else none[0]
            return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old) if new.ndim else old

        ahead = _Ahead(
            cache=jax.tree.map(chosen, fresh, ahead.cache),
            tokens=jnp.where(none[:, None], tokens, ahead.tokens),
            active=jnp.where(none[:, None], active, ahead.active),
            start=jnp.where(none, state.taken, ahead.start),
        )
        return replace(state, ahead=ahead, written=written)

    def refill(self, state: _Slots) -> _Slots:
        """Move sequences into free slots, and decode until there is room for more."""
        taking = self._room(state)[:, None]
        place = jnp.arange(self.chunk, dtype=jnp.int32)[None]
        sequences = state.taken[:, None] + place
        at = sequences - state.ahead.start[:, None]
        # A place outside of the slots is written nowhere.
        free = jnp.argsort(state.active, axis=1)[:, : self.chunk].astype(jnp.int32)
        slots = jnp.where(place < taking, free, self.slots + place)
        queues = len(taking)
        fresh = jax.tree.map(
            lambda x: _merge(_take(_split(x, queues), at)) if x.ndim else x, state.ahead.cache
        )
        if self.grow is not None:
            fresh = self.grow(fresh, self.tokens.shape[2] + self.noise.shape[2] - 1)

        def replaced(running: Array, new: Array) -> Array:
            if not running.ndim:
                return running
            return _merge(_put(_split(running, queues), _split(new, queues), slots))

        state = replace(
            state,
            cache=jax.tree.map(replaced, state.cache, fresh),
            tokens=_put(state.tokens, _take(state.ahead.tokens, at), slots),
            sequences=_put(state.sequences, sequences, slots),
            t=_put(state.t, jnp.ones_like(sequences), slots),
            active=_put(state.active, _take(state.ahead.active, at), slots),
            taken=state.taken + taking[:, 0],
        )
        return jax.lax.while_loop(self.runs, self.one_token, state)

    def one_token(self, state: _Slots) -> _Slots:
        """One more token of every active slot; the others compute what nobody reads."""
        hidden, cache = self.step(_merge(state.tokens), state.cache)
        tokens, active, written = self._write(
            hidden, state.sequences, state.t, state.active, state.written
        )
        return replace(
            state, cache=cache, tokens=tokens, t=state.t + 1, active=active, written=written
        )

    def runs(self, state: _Slots) -> Bool[Array, ""]:
        """Whether to go on decoding: some slot is active, and no queue has room for a refill.

        Where one has it, the others take what they have room for, since their devices wait anyway.
        """
        wanted = jnp.minimum(self.waiting(state), self.chunk)
        refill = (wanted > 0) & (self._free(state) >= wanted)
        return jnp.any(state.active) & ~jnp.any(refill)

    def _read(self, tokens: Int[Array, "n P"], mask: Bool[Array, "n P"]):
        """`read` for what waits: without room for its decode steps where that can be added."""
        return self.read(tokens, mask) if self.grow is None else self.read(tokens, mask, 0)

    def _free(self, state: _Slots) -> Int[Array, " Q"]:
        return jnp.sum(~state.active, axis=1, dtype=jnp.int32)

    def _left(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences of each queue that are read and not taken."""
        return state.ahead.start + self.slots - state.taken

    def _room(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences that a refill takes from each queue now."""
        there = jnp.minimum(self.waiting(state), self._left(state))
        return jnp.minimum(jnp.minimum(self._free(state), there), self.chunk)

    def _write(
        self,
        hidden: Float[Array, "C D"],
        sequences: Int[Array, "Q X"],
        t: Int[Array, "Q X"],
        active: Bool[Array, "Q X"],
        written: Written,
    ) -> tuple[Int[Array, "Q X"], Bool[Array, "Q X"], Written]:
        """Draw token t of some sequences and write what is active: (tokens, still active, all)."""
        _, rows, length, _ = self.noise.shape
        noise = _take(self.noise, sequences, t)
        *drawn, is_eos = (_split(x, len(t)) for x in self.draw(hidden, _merge(noise), _merge(t)))
        tokens, logprobs, behaviour = drawn
        target = jnp.where(active, sequences, rows + jnp.arange(t.shape[1], dtype=t.dtype)[None])
        entry = (tokens, active, logprobs, behaviour)
        written = tuple(_put(x, value, target, t) for x, value in zip(written, entry, strict=True))
        return tokens, active & ~is_eos & (t + 1 < length), written


def _split(x: Array, queues: int) -> Array:
    return x.reshape(queues, -1, *x.shape[1:])


def _merge(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _take(x: Array, *indices: Int[Array, "Q X"]) -> Array:
    """x[q, i, ...] for the indices of each queue, the nearest one where there is none."""
    return jax.vmap(lambda x, *i: x.at[i].get(mode="clip"))(x, *indices)


def _put(x: Array, values: Array, *indices: Int[Array, "Q X"]) -> Array:
    """`x` with values[q, j] at x[q, i, ...] for the indices [q, j]; one outside is left out."""
    put = jax.vmap(lambda x, v, *i: x.at[i].set(v, mode="drop", unique_indices=True))
    return put(x, values, *indices)
