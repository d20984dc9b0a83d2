"""A decode loop with a queue: a slot whose sequence has ended takes the next one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..config import GenerationConfig
from ..models.protocol import Cache, DecodeStep
from ..types import Prompts
from .lockstep import Draw, Read, Written, blank, rooms_of_loops
from .rows import merge, put, put_rows, split, take, take_rows

_REFILLS = 8
"""Slots over those of a refill: fewer refills keep more slots waiting, more move few rows."""

_DRAINS = 2, 4
"""Slots over those that the last sequences are decoded in, as they become fewer."""


def decode_queue(
    read: Read,
    draw: Draw,
    step: DecodeStep,
    prompts: Prompts,
    noise: Float[Array, "B T 2"],
    *,
    config: GenerationConfig,
    grow: Callable[[Cache, int], Cache] | None,
    queues: int,
) -> Written:
    """Draw and step C sequences at a time until all B have ended.

    A sequence waits in the queue, is read ahead, is in a slot, and is written:

    * Prompts are read ahead as many as fit beside the slots, once for all G samples, and the first
      token of each is drawn.
    * Where enough slots are free, a few sequences that were read are moved in together.
    * All slots step together, whatever the t of each. One whose sequence has ended computes what
      nobody reads until it is filled again.

    Every queue has its own part of the prompts and of the slots, so that one on a device never asks
    another. With `grow` the first T - 1 steps are in up to four loops, each with a cache that has
    room up to its own end; from then on the cache is full, a ring.

    Args:
        read, draw, step: see `Read`, `Draw`, `DecodeStep`.
        prompts: N of them, in the order in which they are taken.
        noise: uniforms in [0, 1).
        config: lengths, samples per prompt, and C = `decode_slots`.
        grow: see `Decoder`: what is read ahead then has room for the prompt alone.
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
    rooms = rooms_of_loops(noise.shape[1], growing=grow is not None)
    queue = _Queue(
        read, draw, step, grow,
        tokens=split(prompts.tokens, queues), mask=split(prompts.mask, queues),
        noise=split(noise, queues), config=config, slots=here, chunk=refill_size(here),
        room=rooms[0],
    )  # fmt: skip
    state = queue.idle()
    for room in rooms:
        queue = replace(queue, room=room)
        state = queue.decode(replace(state, cache=queue.with_room(state.cache)))
    for width, few in pairwise([*queue.widths, 0]):
        state = jax.lax.while_loop(
            partial(queue.more_than, few), queue.one_token, queue.narrow(state, width)
        )
    return jax.tree.map(merge, state.written)


def refill_size(slots: int) -> int:
    """Sequences that are moved into `slots` slots together."""
    return max(1, slots // _REFILLS)


class _Ahead(eqx.Module):
    """Sequences of each of Q queues of which the prompt is read and the first token drawn.

    Room for as many as there are slots, a ring: sequence n lies at n modulo C. `active` says which
    have not ended, `read` counts those that were put here.
    """

    cache: Cache
    tokens: Int[Array, "Q C"]
    active: Bool[Array, "Q C"]
    read: Int[Array, " Q"]


class _Slots(eqx.Module):
    """What each of C slots of each of Q queues is doing.

    `tokens` were drawn last and are not read yet, `sequences` are places in the queue, `t` is the
    index of the next token, `taken` counts the sequences that have left the queue, `steps` the
    decode steps of them all.
    """

    cache: Cache
    tokens: Int[Array, "Q C"]
    sequences: Int[Array, "Q C"]
    t: Int[Array, "Q C"]
    active: Bool[Array, "Q C"]
    taken: Int[Array, " Q"]
    steps: Int[Array, ""]
    ahead: _Ahead
    written: Written


@dataclass(frozen=True)
class _Queue:
    """What waits, and how it is read, drawn and decoded.

    `chunk` sequences make a refill. `room` is how many decode steps the running cache can hold.
    With T - 1 it needs no more, however many steps there are: its response slots are used again, as
    a ring.
    """

    read: Read
    draw: Draw
    step: DecodeStep
    grow: Callable[[Cache, int], Cache] | None
    tokens: Int[Array, "Q N P"]
    mask: Bool[Array, "Q N P"]
    noise: Float[Array, "Q B T 2"]
    config: GenerationConfig
    slots: int
    chunk: int
    room: int

    def idle(self) -> _Slots:
        """Nothing read yet, and no room for decode steps where that can be added.

        Of the cache that is read here only the rank-0 leaves are kept.
        """
        queues, rows, length, _ = self.noise.shape
        hidden, like = self._read(merge(self.tokens[:, :1]), merge(self.mask[:, :1]))

        def empty(x: Array) -> Array:
            return jnp.zeros((queues * self.slots, *x.shape[1:]), x.dtype) if x.ndim else x

        cache = jax.tree.map(empty, like)
        zeros, none = jnp.zeros((queues, self.slots), jnp.int32), jnp.zeros(queues, jnp.int32)
        inactive = jnp.zeros((queues, self.slots), bool)
        ahead = _Ahead(cache, zeros, inactive, none)
        return _Slots(
            cache=cache, tokens=zeros, sequences=zeros, t=zeros,
            active=inactive, taken=none, steps=jnp.zeros((), jnp.int32), ahead=ahead,
            written=blank((queues, rows, length), hidden.dtype, self.config.pad_token_id),
        )  # fmt: skip

    def waiting(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences that have not been taken."""
        return self.noise.shape[1] - state.taken

    def decode(self, state: _Slots) -> _Slots:
        """Decode in all slots until fewer are enough, or the cache has no more room."""

        def some(state: _Slots) -> _Slots:
            state = jax.lax.cond(self.lacks(state), self.read_ahead, lambda state: state, state)
            return jax.lax.while_loop(
                lambda state: self.goes_on(state) & ~self.lacks(state), self.refill, state
            )

        return jax.lax.while_loop(self.goes_on, some, state)

    def goes_on(self, state: _Slots) -> Bool[Array, ""]:
        """Whether the cache has room, and fewer slots would not do: some sequences wait, or
        `narrow` would lose an active one.
        """
        has_room = (state.steps < self.room) | (self.room == self.noise.shape[2] - 1)
        waits = jnp.any(self.waiting(state) > 0)
        return has_room & (waits | self.more_than(self.widths[0], state))

    def lacks(self, state: _Slots) -> Bool[Array, ""]:
        """Whether some queue has slots for what it has not read."""
        return jnp.any(self._has_slots(state) & (self._left(state) == 0))

    def read_ahead(self, state: _Slots) -> _Slots:
        """Read the next prompts of every queue and draw their first tokens, as many as fit."""
        samples, ahead = self.config.samples_per_prompt, state.ahead
        place = jnp.arange(self.slots, dtype=jnp.int32)[None]
        prompt = ahead.read[:, None] // samples + place[:, : self.slots // samples]
        hidden, fresh = self._read(merge(take(self.tokens, prompt)), merge(take(self.mask, prompt)))
        room = (self.slots - self._left(state)) // samples * samples
        reads = jnp.minimum(room, self.noise.shape[1] - ahead.read)
        fits, sequences = place < reads[:, None], ahead.read[:, None] + place
        tokens, active, written = self._write(
            hidden, sequences, jnp.zeros_like(sequences), fits, state.written
        )
        # A place outside of the slots is written nowhere.
        at = jnp.where(fits, sequences % self.slots, self.slots + place)
        ahead = _Ahead(
            cache=put_rows(ahead.cache, fresh, at),
            tokens=put(ahead.tokens, tokens, at),
            active=put(ahead.active, active, at),
            read=ahead.read + reads,
        )
        return replace(state, ahead=ahead, written=written)

    def refill(self, state: _Slots) -> _Slots:
        """Move sequences into free slots, and decode until there is room for more."""
        ahead, taking = state.ahead, self._room(state)
        place = jnp.arange(self.chunk, dtype=jnp.int32)[None]
        sequences = state.taken[:, None] + place
        at = sequences % self.slots
        free = jnp.argsort(state.active, axis=1)[:, : self.chunk].astype(jnp.int32)
        slots = jnp.where(place < taking[:, None], free, self.slots + place)
        fresh = self.with_room(take_rows(ahead.cache, at))
        state = replace(
            state,
            cache=put_rows(state.cache, fresh, slots),
            tokens=put(state.tokens, take(ahead.tokens, at), slots),
            sequences=put(state.sequences, sequences, slots),
            t=put(state.t, jnp.ones_like(sequences), slots),
            active=put(state.active, take(ahead.active, at), slots),
            taken=state.taken + taking,
        )
        return jax.lax.while_loop(self.runs, self.one_token, state)

    def one_token(self, state: _Slots) -> _Slots:
        """One more token of every active slot; the others compute what nobody reads."""
        hidden, cache = self.step(merge(state.tokens), state.cache)
        tokens, active, written = self._write(
            hidden, state.sequences, state.t, state.active, state.written
        )
        return replace(
            state, cache=cache, tokens=tokens, t=state.t + 1, active=active, written=written,
            steps=state.steps + 1,
        )  # fmt: skip

    def runs(self, state: _Slots) -> Bool[Array, ""]:
        """Whether to go on without a refill: some slots are active, and no queue needs one.

        Where one does, the others take what they have room for, since their devices wait anyway.
        """
        return self.goes_on(state) & self.more_than(0, state) & ~jnp.any(self._has_slots(state))

    def more_than(self, few: Int[Array, ""] | int, state: _Slots) -> Bool[Array, ""]:
        """Whether more than `few` slots of some queue are active."""
        return jnp.any(jnp.sum(state.active, axis=1) > few)

    def narrow(self, state: _Slots, width: int) -> _Slots:
        """`width` slots of each queue by themselves, the active ones among them."""
        last = jnp.argsort(~state.active, axis=1)[:, :width]
        return replace(
            state,
            cache=take_rows(state.cache, last),
            tokens=take(state.tokens, last),
            sequences=take(state.sequences, last),
            t=take(state.t, last),
            active=take(state.active, last),
        )

    @property
    def widths(self) -> list[int]:
        """Slots of each queue in which its last sequences are decoded, one after the other."""
        return sorted({max(1, self.slots // n) for n in _DRAINS}, reverse=True)

    def with_room(self, cache: Cache) -> Cache:
        """What `_read` gave, or the running cache, with room for `room` decode steps."""
        if self.grow is None:
            return cache
        return self.grow(cache, self.tokens.shape[2] + self.room)

    def _read(self, tokens: Int[Array, "n P"], mask: Bool[Array, "n P"]):
        """`read` for what waits: without room for its decode steps where that can be added."""
        return self.read(tokens, mask) if self.grow is None else self.read(tokens, mask, 0)

    def _has_slots(self, state: _Slots) -> Bool[Array, " Q"]:
        """Whether a refill, or all that wait if they are fewer, would find free slots."""
        wanted = jnp.minimum(self.waiting(state), self.chunk)
        return (wanted > 0) & (self._free(state) >= wanted)

    def _free(self, state: _Slots) -> Int[Array, " Q"]:
        return jnp.sum(~state.active, axis=1, dtype=jnp.int32)

    def _left(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences of each queue that are read and not taken."""
        return state.ahead.read - state.taken

    def _room(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences that a refill takes from each queue now."""
        return jnp.minimum(jnp.minimum(self._free(state), self._left(state)), self.chunk)

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
        noise = take(self.noise, sequences, t)
        *drawn, is_eos = (split(x, len(t)) for x in self.draw(hidden, merge(noise), merge(t)))
        tokens, logprobs, behaviour = drawn
        target = jnp.where(active, sequences, rows + jnp.arange(t.shape[1], dtype=t.dtype)[None])
        entry = (tokens, active, logprobs, behaviour)
        written = tuple(put(x, value, target, t) for x, value in zip(written, entry, strict=True))
        return tokens, active & ~is_eos & (t + 1 < length), written
