"""Continuous batching: a slot whose sequence has ended takes the next one of a queue."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..models.protocol import Cache
from .decoding import Decoding, Responses, cache_capacities, empty_responses
from .rows import merge, put, put_rows, split, take, take_rows

_SLOTS_PER_REFILL = 8
"""A refill waits for 1/8 of the slots: later leaves slots idle, sooner moves few rows at a time."""

_DRAINS = 2, 4
"""The last sequences are decoded in 1/2, then in 1/4 of the slots."""


def decode_queue(decoding: Decoding, num_shards: int) -> Responses:
    """Sample and step C = `config.decode_slots` sequences at a time until all B have ended.

    A sequence waits in a queue, is prefetched, is in a slot, and has ended:

    * As many prompts are prefetched as fill all slots. One prefill serves the G samples of a
      prompt, and the first token of each is sampled.
    * Where enough slots are free, a few prefetched sequences are moved in together (a refill).
    * All slots step together, each at its own t. A slot whose sequence has ended computes what
      nobody reads until it is refilled.

    Each shard has its own queue of prompts and its own slots, so that devices do not communicate.
    With `grow`, prefetched sequences have slots for the prompt alone, and the first T - 1 steps are
    in up to four loops whose caches grow. After them the cache is full, and its response slots are
    used again as a ring.

    Args:
        decoding: see `Decoding`.
        num_shards: Q.

    Returns:
        The responses, arrays [B, T].

    Raises:
        ValueError: slots or prompts do not divide over the shards.
    """
    queue = _Queue.over(decoding, num_shards)
    state = queue.idle()
    for capacity in queue.capacities:
        queue = replace(queue, capacity=capacity)
        state = queue.decode(replace(state, cache=queue.with_capacity(state.cache)))
    for width, fewer in pairwise([*queue.widths, 0]):
        state = jax.lax.while_loop(
            partial(queue.more_than, fewer), queue.one_token, queue.narrow(state, width)
        )
    return jax.tree.map(merge, state.responses)


def refill_size(slots: int) -> int:
    """Sequences that are moved into `slots` slots together."""
    return max(1, slots // _SLOTS_PER_REFILL)


class _Prefetched(eqx.Module):
    """Sequences whose prompt is read and whose first token is sampled.

    A ring of as many places as slots: sequence n lies at n modulo C. `active` says which have not
    ended, `count` is how many were ever put here.
    """

    cache: Cache
    tokens: Int[Array, "Q C"]
    active: Bool[Array, "Q C"]
    count: Int[Array, " Q"]


class _Slots(eqx.Module):
    """What each of C slots of each of Q shards is doing.

    `tokens` were sampled last and are not read yet, `sequences` are places in the queue, `t` is the
    index of the next token. `taken` counts the sequences that have left a queue, `steps` the decode
    steps of all slots.
    """

    cache: Cache
    tokens: Int[Array, "Q C"]
    sequences: Int[Array, "Q C"]
    t: Int[Array, "Q C"]
    active: Bool[Array, "Q C"]
    taken: Int[Array, " Q"]
    steps: Int[Array, ""]
    prefetched: _Prefetched
    responses: Responses


@dataclass(frozen=True)
class _Queue:
    """What waits and what happens to it: `slots` per shard, `capacity` of the running cache."""

    decoding: Decoding
    tokens: Int[Array, "Q N P"]
    mask: Bool[Array, "Q N P"]
    noise: Float[Array, "Q B T 2"]
    slots: int
    capacity: int

    @classmethod
    def over(cls, decoding: Decoding, num_shards: int) -> "_Queue":
        """The queues of `num_shards` shards."""
        config, prompts = decoding.config, decoding.prompts
        slots, samples, count = config.decode_slots, config.samples_per_prompt, len(prompts.tokens)
        if slots is None or slots % (num_shards * samples) or count % num_shards:
            raise ValueError(
                f"decode_slots={slots} must be a multiple of samples_per_prompt={samples} * "
                f"{num_shards} shards, and the {count} prompts a multiple of {num_shards}."
            )
        arrays = (prompts.tokens, prompts.mask, decoding.noise)
        tokens, mask, noise = (split(x, num_shards) for x in arrays)
        return cls(decoding, tokens, mask, noise, slots // num_shards, tokens.shape[-1])

    @property
    def capacities(self) -> list[int]:
        """Slots of the cache in each loop; with the last one it needs no more."""
        width, length = self.tokens.shape[2], self.noise.shape[2]
        return cache_capacities(width, length, growing=self.decoding.grow is not None)

    @property
    def widths(self) -> list[int]:
        """Slots of each shard in which its last sequences are decoded, one after the other."""
        return sorted({max(1, self.slots // n) for n in _DRAINS}, reverse=True)

    def idle(self) -> _Slots:
        """Nothing prefetched yet, and a cache of the prefetched sequences' capacity.

        The prefill here gives the cache its structure, and the values of its rank-0 leaves.
        """
        shards, rows, length, _ = self.noise.shape
        hidden, like = self._prefill(self.tokens[:, :1], self.mask[:, :1])

        def empty(x: Array) -> Array:
            return jnp.zeros((shards * self.slots, *x.shape[1:]), x.dtype) if x.ndim else x

        cache = jax.tree.map(empty, like)
        zeros, none = jnp.zeros((shards, self.slots), jnp.int32), jnp.zeros(shards, jnp.int32)
        inactive, pad_id = jnp.zeros(zeros.shape, bool), self.decoding.config.pad_token_id
        return _Slots(
            cache=cache, tokens=zeros, sequences=zeros, t=zeros, active=inactive,
            taken=none, steps=jnp.zeros((), jnp.int32),
            prefetched=_Prefetched(cache, zeros, inactive, none),
            responses=empty_responses((shards, rows, length), hidden.dtype, pad_id),
        )  # fmt: skip

    def decode(self, state: _Slots) -> _Slots:
        """Decode in all slots until fewer are enough, or the cache is full and may grow."""

        def some(state: _Slots) -> _Slots:
            state = jax.lax.cond(self.lacks(state), self.prefetch, lambda state: state, state)
            return jax.lax.while_loop(
                lambda state: self.continues(state) & ~self.lacks(state), self.refill, state
            )

        return jax.lax.while_loop(self.continues, some, state)

    def continues(self, state: _Slots) -> Bool[Array, ""]:
        """Whether the cache has slots, and `narrow` would lose an active or a waiting sequence."""
        last = self.capacity == self.capacities[-1]
        has_slots = last | (self.tokens.shape[2] + state.steps < self.capacity)
        waits = jnp.any(self._waiting(state) > 0)
        return has_slots & (waits | self.more_than(self.widths[0], state))

    def lacks(self, state: _Slots) -> Bool[Array, ""]:
        """Whether some shard could refill slots, but has nothing prefetched."""
        return jnp.any(self._can_refill(state) & (self._left(state) == 0))

    def prefetch(self, state: _Slots) -> _Slots:
        """Prefill the next prompts of every shard and sample their first tokens.

        A prefill has the rows of all slots, its shape being static; those that do not fit are lost.
        """
        samples, ahead = self.decoding.config.samples_per_prompt, state.prefetched
        place = jnp.arange(self.slots, dtype=jnp.int32)[None]
        prompt = ahead.count[:, None] // samples + place[:, : self.slots // samples]
        hidden, fresh = self._prefill(take(self.tokens, prompt), take(self.mask, prompt))
        vacant = (self.slots - self._left(state)) // samples * samples
        added = jnp.minimum(vacant, self.noise.shape[1] - ahead.count)
        fits, sequences = place < added[:, None], ahead.count[:, None] + place
        tokens, active, responses = self._sample(
            hidden, sequences, jnp.zeros_like(sequences), fits, state.responses
        )
        # `put` drops a place outside of the slots.
        at = jnp.where(fits, sequences % self.slots, self.slots + place)
        prefetched = _Prefetched(
            cache=put_rows(ahead.cache, fresh, at),
            tokens=put(ahead.tokens, tokens, at),
            active=put(ahead.active, active, at),
            count=ahead.count + added,
        )
        return replace(state, prefetched=prefetched, responses=responses)

    def refill(self, state: _Slots) -> _Slots:
        """Move prefetched sequences into free slots, and decode until the next refill."""
        ahead, size = state.prefetched, refill_size(self.slots)
        moved = jnp.minimum(jnp.minimum(self._free(state), self._left(state)), size)
        place = jnp.arange(size, dtype=jnp.int32)[None]
        sequences = state.taken[:, None] + place
        at = sequences % self.slots
        free = jnp.argsort(state.active, axis=1)[:, :size].astype(jnp.int32)
        slots = jnp.where(place < moved[:, None], free, self.slots + place)
        fresh = self.with_capacity(take_rows(ahead.cache, at))
        state = replace(
            state,
            cache=put_rows(state.cache, fresh, slots),
            tokens=put(state.tokens, take(ahead.tokens, at), slots),
            sequences=put(state.sequences, sequences, slots),
            t=put(state.t, jnp.ones_like(sequences), slots),
            active=put(state.active, take(ahead.active, at), slots),
            taken=state.taken + moved,
        )
        return jax.lax.while_loop(self.runs, self.one_token, state)

    def one_token(self, state: _Slots) -> _Slots:
        """One more token of every active slot; the others compute what nobody reads."""
        hidden, cache = self.decoding.step(merge(state.tokens), state.cache)
        tokens, active, responses = self._sample(
            hidden, state.sequences, state.t, state.active, state.responses
        )
        return replace(
            state, cache=cache, tokens=tokens, t=state.t + 1, active=active, responses=responses,
            steps=state.steps + 1,
        )  # fmt: skip

    def runs(self, state: _Slots) -> Bool[Array, ""]:
        """Whether to go on without a refill: some slots are active, and no shard can refill.

        Where one can, the others refill what they can too, since their devices wait anyway.
        """
        return self.continues(state) & self.more_than(0, state) & ~jnp.any(self._can_refill(state))

    def more_than(self, few: Int[Array, ""] | int, state: _Slots) -> Bool[Array, ""]:
        """Whether more than `few` slots of some shard are active."""
        return jnp.any(jnp.sum(state.active, axis=1) > few)

    def narrow(self, state: _Slots, width: int) -> _Slots:
        """`width` slots of each shard by themselves, the active ones among them."""
        last = jnp.argsort(~state.active, axis=1)[:, :width]
        return replace(
            state,
            cache=take_rows(state.cache, last),
            tokens=take(state.tokens, last),
            sequences=take(state.sequences, last),
            t=take(state.t, last),
            active=take(state.active, last),
        )

    def with_capacity(self, cache: Cache) -> Cache:
        """A prefetched or the running cache, grown to `capacity` slots."""
        grow = self.decoding.grow
        return cache if grow is None else grow(cache, self.capacity)

    def _prefill(self, tokens: Int[Array, "Q n P"], mask: Bool[Array, "Q n P"]):
        """Hidden states and caches, without response slots where these can be added later."""
        capacity = self.capacities[-1] if self.decoding.grow is None else tokens.shape[2]
        return self.decoding.prefill(merge(tokens), merge(mask), capacity)

    def _can_refill(self, state: _Slots) -> Bool[Array, " Q"]:
        """Whether a whole refill, or all that wait if they are fewer, would find free slots."""
        wanted = jnp.minimum(self._waiting(state), refill_size(self.slots))
        return (wanted > 0) & (self._free(state) >= wanted)

    def _waiting(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences of each shard that are not in a slot yet, prefetched ones included."""
        return self.noise.shape[1] - state.taken

    def _free(self, state: _Slots) -> Int[Array, " Q"]:
        return jnp.sum(~state.active, axis=1, dtype=jnp.int32)

    def _left(self, state: _Slots) -> Int[Array, " Q"]:
        """Sequences of each shard that are prefetched and not in a slot yet."""
        return state.prefetched.count - state.taken

    def _sample(
        self,
        hidden: Float[Array, "C D"],
        sequences: Int[Array, "Q X"],
        t: Int[Array, "Q X"],
        active: Bool[Array, "Q X"],
        responses: Responses,
    ) -> tuple[Int[Array, "Q X"], Bool[Array, "Q X"], Responses]:
        """Sample token t of some sequences, write the active ones: (tokens, still active, all)."""
        rows, length = self.noise.shape[1:3]
        noise = merge(take(self.noise, sequences, t))
        sampled = self.decoding.sample(hidden, noise, merge(t))
        sampled = jax.tree.map(lambda x: split(x, len(t)), sampled)
        entry = Responses(sampled.tokens, active, sampled.logprobs, sampled.behaviour_logprobs)
        target = jnp.where(active, sequences, rows + jnp.arange(t.shape[1], dtype=t.dtype)[None])
        responses = jax.tree.map(lambda x, value: put(x, value, target, t), responses, entry)
        return sampled.tokens, active & ~sampled.is_eos & (t + 1 < length), responses
