"""A decode loop with a queue: a slot whose sequence has ended takes the next one."""

from collections.abc import Callable
from dataclasses import dataclass
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

_REFILLS = 4
"""Slots over those of a refill: fewer refills keep more slots waiting, more read few prompts."""


def decode_queue(
    read: Read,
    draw: Draw,
    step: Decoder,
    prompts: Prompts,
    noise: Float[Array, "B T 2"],
    *,
    config: GenerationConfig,
    queues: int = 1,
) -> Written:
    """Draw and step C sequences at a time until all B have ended.

    Slots wait until there is room for a few prompts, which then are read together, each once for
    its G samples. All rows step together, whatever their t. Every queue has its own part of the
    prompts and of the slots, so that one on a device never asks another.

    Args:
        read, draw, step: see `Read`, `Draw`, `Decoder`.
        prompts: N of them, in the order in which they are taken.
        noise: uniforms in [0, 1).
        config: lengths, samples per prompt, and C = `decode_slots`.
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
        read, draw, step,
        tokens=_split(prompts.tokens, queues), mask=_split(prompts.mask, queues),
        noise=_split(noise, queues), config=config,
        slots=here, chunk=refill_size(here, samples),
    )  # fmt: skip
    state = jax.lax.while_loop(
        lambda state: jnp.any(state.taken < count // queues),
        lambda state: jax.lax.while_loop(queue.runs, queue.one_token, queue.refill(state)),
        queue.idle(),
    )
    return jax.tree.map(_merge, state.written)


def refill_size(slots: int, samples: int) -> int:
    """Prompts read at a time into `slots` slots, G = `samples` of them for each prompt."""
    return max(1, slots // (_REFILLS * samples))


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


class _Slots(eqx.Module):
    """What each of C slots of each of Q queues is doing.

    `tokens` were drawn last and are not read yet, `sequences` are places in the queue, `t` is the
    index of the next token, `taken` counts the prompts that have left the queue.
    """

    cache: Cache
    tokens: Int[Array, "Q C"]
    sequences: Int[Array, "Q C"]
    t: Int[Array, "Q C"]
    active: Bool[Array, "Q C"]
    taken: Int[Array, " Q"]
    written: Written


@dataclass(frozen=True)
class _Queue:
    """What waits, and how it is read, drawn and decoded; `chunk` prompts make a refill."""

    read: Read
    draw: Draw
    step: Decoder
    tokens: Int[Array, "Q N P"]
    mask: Bool[Array, "Q N P"]
    noise: Float[Array, "Q B T 2"]
    config: GenerationConfig
    slots: int
    chunk: int

    def idle(self) -> _Slots:
        """Nothing taken yet. Of the cache that is read here only the rank-0 leaves are kept."""
        queues, rows, length, _ = self.noise.shape
        hidden, like = self.read(_merge(self.tokens[:, :1]), _merge(self.mask[:, :1]))

        def empty(x: Array) -> Array:
            return jnp.zeros((queues * self.slots, *x.shape[1:]), x.dtype) if x.ndim else x

        zeros = jnp.zeros((queues, self.slots), jnp.int32)
        return _Slots(
            cache=jax.tree.map(empty, like),
            tokens=zeros, sequences=zeros, t=zeros, active=zeros > 0,
            taken=jnp.zeros(queues, jnp.int32),
            written=blank((queues, rows, length), hidden.dtype, self.config.pad_token_id),
        )  # fmt: skip

    def refill(self, state: _Slots) -> _Slots:
        """Read the next prompts of each queue into free slots and draw their first tokens."""
        samples = self.config.samples_per_prompt
        taking = self._room(state)
        prompt = state.taken[:, None] + jnp.arange(self.chunk, dtype=jnp.int32)[None]
        hidden, fresh = self.read(
            _merge(_take(self.tokens, prompt)), _merge(_take(self.mask, prompt))
        )
        place = jnp.arange(self.chunk * samples, dtype=jnp.int32)[None]
        # A place outside of the slots, or of the queue, is written nowhere.
        taken = place < samples * taking[:, None]
        free = jnp.argsort(state.active, axis=1)[:, : place.size].astype(jnp.int32)
        slots = jnp.where(taken, free, self.slots + place)
        sequences = state.taken[:, None] * samples + place
        first = jnp.zeros_like(sequences)
        tokens, active, written = self._write(hidden, sequences, first, taken, state.written)

        def replaced(running: Array, new: Array) -> Array:
            if not running.ndim:
                return running
            queues = len(taking)
            return _merge(_put(_split(running, queues), _split(new, queues), slots))

        return _Slots(
            cache=jax.tree.map(replaced, state.cache, fresh),
            tokens=_put(state.tokens, tokens, slots),
            sequences=_put(state.sequences, sequences, slots),
            t=_put(state.t, first + 1, slots),
            active=_put(state.active, active, slots),
            taken=state.taken + taking,
            written=written,
        )

    def one_token(self, state: _Slots) -> _Slots:
        """One more token of every active slot; the others compute what nobody reads."""
        hidden, cache = self.step(_merge(state.tokens), state.cache)
        tokens, active, written = self._write(
            hidden, state.sequences, state.t, state.active, state.written
        )
        return _Slots(
            cache, tokens, state.sequences, state.t + 1, active, state.taken, written
        )  # fmt: skip

    def runs(self, state: _Slots) -> Bool[Array, ""]:
        """Whether to go on decoding: some slot is active, and no queue has room for a refill.

        Where one has it, the others take what they have room for, since their devices wait anyway.
        """
        wanted = self._wanted(state)
        refill = (wanted > 0) & (self._room(state) == wanted)
        return jnp.any(state.active) & ~jnp.any(refill)

    def _wanted(self, state: _Slots) -> Int[Array, " Q"]:
        """Prompts that a refill of each queue would take if there were room."""
        return jnp.minimum(self.tokens.shape[1] - state.taken, self.chunk)

    def _room(self, state: _Slots) -> Int[Array, " Q"]:
        """Prompts that a refill takes from each queue now."""
        free = jnp.sum(~state.active, axis=1, dtype=jnp.int32) // self.config.samples_per_prompt
        return jnp.minimum(free, self._wanted(state))

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
