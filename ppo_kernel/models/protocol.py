"""What a model must offer to be trained here: four methods of a policy, one call of a critic.

Inexact arrays are trained. Every other leaf (an integer, a function, a setting) is carried along
unchanged. Any `eqx.Module` will do.
"""

from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

Cache: TypeAlias = PyTree[Array]
"""What a policy remembers between tokens.

The leading axis of every leaf is the batch; a leaf of rank 0 is shared by all rows. The rollout
repeats rows for the samples of a prompt. With `decode_slots` it also replaces single rows while the
others go on: the new row comes from another prefill, and leaves of rank 0 stay as they are, so they
must hold for old and new rows alike. The loop then takes more than `capacity` - P steps in all,
though no row takes more: see the ring of `KVCache`.
"""


@runtime_checkable
class DecodeStep(Protocol):
    """One decode step: reads the tokens drawn last, returns the states that predict the next."""

    def __call__(
        self, tokens: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B D"], Cache]: ...


@runtime_checkable
class Unembed(Protocol):
    """Rows of hidden states -> rows of logits."""

    def __call__(self, hidden: Float[Array, "C D"]) -> Float[Array, "C V"]: ...


@runtime_checkable
class GrowCache(Protocol):
    """A cache -> the same cache with room for `capacity` slots, before any slot is reused."""

    def __call__(self, cache: Cache, capacity: int) -> Cache: ...


class Decoder(NamedTuple):
    """What the decode loop calls.

    Attributes:
        step: one decode step.
        unembed: the logits of `Policy.unembed`, from weights laid out for few rows.
        grow: gives a cache in use more slots; None where a cache needs no room. With it, a long
            response is decoded in up to four loops and attention reads few empty slots.
    """

    step: DecodeStep
    unembed: Unembed
    grow: GrowCache | None = None


@runtime_checkable
class Policy(Protocol):
    """A language model that can be sampled from and trained.

    Two laws tie the methods. Token by token, `prefill` and `decoder().step` give the hidden states
    of `hidden` on the whole sequence. Slots outside the mask change nothing. They are judged by
    `testing.check_policy`.

    Everywhere `tokens` are ids in [0, V), `mask` says which slots hold one, `start` is the first
    slot whose result is read, and `capacity` is how many slots a cache has room for.
    """

    def hidden(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int = 0
    ) -> Float[Array, "B rest D"]:
        """Final hidden states of slots `start` to S - 1; slot i sees the valid slots up to i.

        Losses and scores pass the last slot of the prompts as `start`: a model may skip work that
        only earlier results need.
        """
        ...

    def unembed(self, hidden: Float[Array, "C D"]) -> Float[Array, "C V"]:
        """Rows of hidden states -> rows of logits."""
        ...

    def prefill(
        self, tokens: Int[Array, "N P"], mask: Bool[Array, "N P"], capacity: int
    ) -> tuple[Float[Array, "N D"], Cache]:
        """Read left-padded prompts: hidden state of the last slot, cache for `capacity` slots."""
        ...

    def decoder(self) -> Decoder:
        """The functions of the decode loop.

        Called once, outside the loop: the place to lay weights out for decoding.
        """
        ...


@runtime_checkable
class Critic(Protocol):
    """A model with one number per slot: a value model or a reward model."""

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int = 0
    ) -> Float[Array, "B rest"]:
        """Values after reading slots `start` to S - 1, reward units."""
        ...


def vocabulary_size(policy: Policy) -> int:
    """V, from the shape of a policy's logits; nothing is computed."""
    leaves, structure = jax.tree.flatten(policy)
    return _vocabulary_size(structure, tuple(map(_shape_of, leaves)))


def _shape_of(leaf: Any) -> Any:
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf


@lru_cache(maxsize=64)
def _vocabulary_size(structure: Any, leaves: tuple) -> int:
    def logits(policy: Policy):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return policy.unembed(policy.hidden(tokens, tokens == 0)[:, 0])

    return eqx.filter_eval_shape(logits, jax.tree.unflatten(structure, leaves)).shape[-1]
