"""What stands on a trunk: an output head (policy), or one number a slot (critic, reward model)."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..ops.dtypes import promote_types, upcast
from .kernels.decode_matmul import LaidOut
from .kernels.products import wide_product
from .kv_cache import KVCache
from .protocol import Cache, Decoder
from .transformer import Transformer, TransformerConfig


class LanguageModel(eqx.Module):
    """A policy: a trunk and an output matrix.

    Attributes:
        trunk: tokens -> hidden states.
        output: one row a token id, like the embedding; None where it is the embedding (tied); laid
            out while the policy decodes.
    """

    trunk: Transformer
    output: Float[Array, "V D"] | LaidOut | None

    @classmethod
    def init(cls, key: Key[Array, ""], config: TransformerConfig) -> "LanguageModel":
        """Random weights in the shapes of `config`; consumes `key`."""
        trunk_key, output_key = jax.random.split(key)
        trunk = Transformer.init(trunk_key, config)
        if config.tie_embeddings:
            return cls(trunk, None)
        output = 0.02 * jax.random.normal(output_key, trunk.embedding.shape)
        return cls(trunk, output.astype(config.param_dtype))

    def hidden(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        """Final hidden state of every slot; arguments as in `Policy`."""
        return self.trunk(tokens, mask)

    def from_slot(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int
    ) -> Float[Array, "B rest D"]:
        """Final hidden state of the slots from `start` on; arguments as in `FromSlot.from_slot`."""
        return self.trunk.from_slot(tokens, mask, start)

    @jax.named_scope("unembed")
    def unembed(self, hidden: Float[Array, "C D"]) -> Float[Array, "C V"]:
        """Logits of each row of `hidden`, at least float32."""
        matrix = self._matrix()
        if isinstance(matrix, LaidOut):
            return matrix(hidden, promote_types(hidden.dtype, jnp.float32))
        return wide_product(hidden, matrix.astype(hidden.dtype))

    def for_decoding(self) -> "LanguageModel":
        """The same policy, its output matrix laid out; see `DecodingPolicy`."""
        matrix = self._matrix()
        if isinstance(matrix, LaidOut):
            return self
        return replace(self, output=LaidOut.of(matrix.astype(self.trunk.config.compute_dtype)))

    def _matrix(self) -> Float[Array, "V D"] | LaidOut:
        return self.trunk.embedding if self.output is None else self.output

    def prefill(
        self, tokens: Int[Array, "N P"], mask: Bool[Array, "N P"], capacity: int
    ) -> tuple[Float[Array, "N D"], Cache]:
        """Hidden state of the last slot, and the cache; arguments as in `Policy`."""
        return self.trunk.prefill(tokens, mask, capacity)

    def grow(self, cache: KVCache, capacity: int) -> KVCache:
        """The cache with room for `capacity` slots; arguments as in `GrowingPolicy`."""
        return cache.grown(capacity)

    def decoder(self) -> Decoder:
        """The decode step of the trunk."""
        return self.trunk.decoder()


class ValueHead(eqx.Module):
    """A linear map of a hidden state to one number, in at least float32.

    As a critic by itself it sits on the policy's trunk.

    Attributes:
        weight: value = sum_d hidden_d weight_d; reward units per unit of hidden state.
    """

    weight: Float[Array, " D"]

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        return upcast(hidden) @ upcast(self.weight)


class ValueModel(eqx.Module):
    """A critic or a reward model: its own `trunk`, and a `head` for one number a slot."""

    trunk: Transformer
    head: ValueHead

    @classmethod
    def on(cls, trunk: Transformer) -> "ValueModel":
        """A critic on a trunk: the head starts at zero, so the first values are 0."""
        return cls(trunk, ValueHead(jnp.zeros(trunk.config.hidden_size, trunk.embedding.dtype)))

    def __call__(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S"]:
        """Value after reading each slot, reward units."""
        return self.head(self.trunk(tokens, mask))

    def from_slot(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int
    ) -> Float[Array, "B rest"]:
        """Values of the slots from `start` on; arguments as in `FromSlot.from_slot`."""
        return self.head(self.trunk.from_slot(tokens, mask, start))
