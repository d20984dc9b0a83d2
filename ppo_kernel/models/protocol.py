"""What a model must offer to be trained here: a few small protocols.

Every leaf of a model is an array or is left alone: inexact arrays are trained, everything else
(integers, functions, settings) is carried along unchanged. Any `eqx.Module` will do.
"""

from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PyTree

Cache: TypeAlias = PyTree[Array]
"""What a policy remembers between tokens.

The leading axis of every leaf is the batch (a rank-0 leaf is shared by the rows), so that the
rollout can repeat it for the samples of a prompt, or put one prompt's row in the place of
another's, whatever is inside.

With `decode_slots` rows are replaced while the others go on: a row of another prefill goes into
every leaf with a batch axis, and rank-0 leaves stay those of the running cache, so what they say
must hold for old and new rows alike. More steps than `capacity` - P are then taken in all, though
no row takes more: see the ring of `KVCache`.
"""


@runtime_checkable
class Decoder(Protocol):
    """One step of a policy: takes the tokens just drawn, returns what predicts the next ones."""

    def __call__(
        self, tokens: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B D"], Cache]: ...


@runtime_checkable
class Policy(Protocol):
    """A language model that can be sampled from and trained.

    The law that ties the methods: token by token through `prefill` and `decoder` gives the same
    hidden states as `hidden` on the whole sequence, and slots outside the mask change nothing.
    Everywhere `tokens` are ids in [0, V), `mask` says which slots hold one, and `capacity` is how
    many slots the cache has room for.
    """

    def hidden(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        """Final hidden state of every slot; slot i sees the valid slots up to and with i."""
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
        """The step function of the decode loop.

        It is asked for once, outside the loop: the place to lay weights out for decoding.
        """
        ...


@runtime_checkable
class GrowingPolicy(Policy, Protocol):
    """A policy whose cache can be given room for more slots while it is in use.

    A long response is then decoded with a cache that is not much longer than what is written, and
    prompts that are read ahead for `decode_slots` wait without room for a response.
    """

    def grow(self, cache: Cache, capacity: int) -> Cache:
        """`cache`, no slot of which was written twice yet, with room for `capacity` of them."""
        ...


@runtime_checkable
class DecodingPolicy(Policy, Protocol):
    """A policy whose output matrix decode steps read faster when it lies otherwise in memory."""

    def for_decoding(self) -> Policy:
        """The same policy, which gives the same numbers, to be sampled from.

        It is asked for once, outside the decode loop, as `decoder` is for the other weights.
        """
        ...


@runtime_checkable
class FromSlot(Protocol):
    """A policy or critic that need not finish the slots whose results nobody reads.

    Losses and scores read a sequence from the last slot of its prompt on. The last layer of a
    Transformer owes the slots before it no more than their keys and values.
    """

    def from_slot(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int
    ) -> Float[Array, "B rest *D"]:
        """The hidden states of a policy, or the values of a critic, from slot `start` on.

        Args:
            tokens: token ids, shape [B, S].
            mask: whether a slot holds a real token.
            start: the first slot that is read, in 0 .. S - 1.

        Returns:
            [B, S - start, D] of a policy, [B, S - start] of a critic: the last slots of what the
            whole forward pass gives.
        """
        ...


@runtime_checkable
class Critic(Protocol):
    """A model of one number a slot: a value model, or the trunk of a reward model."""

    def __call__(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S"]:
        """Value after reading each slot, reward units."""
        ...
