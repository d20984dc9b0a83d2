"""Heads on a trunk: logits (policy), or one number per slot (critic, reward model)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..ops.dtypes import promote_types, upcast
from .config import TransformerConfig
from .kernels.decode_matmul import DecodeMatrix
from .kernels.products import wide_product
from .kernels.softmax_attention import softcapped
from .kv_cache import KVCache
from .protocol import Cache, Decoder
from .transformer import Transformer


class LanguageModel(eqx.Module):
    """A policy: a trunk and an output matrix.

    Attributes:
        trunk: tokens -> hidden states.
        output: one row per token id, like the embedding; None where it is the embedding (tied).
    """

    trunk: Transformer
    output: Float[Array, "V D"] | None

    @classmethod
    def init(cls, key: Key[Array, ""], config: TransformerConfig) -> "LanguageModel":
        """Random weights in the shapes of `config`; consumes `key`."""
        trunk_key, output_key = jax.random.split(key)
        trunk = Transformer.init(trunk_key, config)
        if config.tie_embeddings:
            return cls(trunk, None)
        output = 0.02 * jax.random.normal(output_key, trunk.embedding.shape)
        return cls(trunk, output.astype(config.param_dtype))

    def hidden(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int = 0
    ) -> Float[Array, "B rest D"]:
        """Final hidden states of slots `start` to S - 1; arguments as in `Policy`."""
        return self.trunk(tokens, mask, start)

    @jax.named_scope("unembed")
    def unembed(self, hidden: Float[Array, "C D"]) -> Float[Array, "C V"]:
        """Logits of each row of `hidden`, at least float32."""
        return self._cap(wide_product(hidden, self._matrix().astype(hidden.dtype)))

    def prefill(
        self, tokens: Int[Array, "N P"], mask: Bool[Array, "N P"], capacity: int
    ) -> tuple[Float[Array, "N D"], Cache]:
        """Hidden state of the last slot, and the cache; arguments as in `Policy`."""
        return self.trunk.prefill(tokens, mask, capacity)

    def decoder(self) -> Decoder:
        """Step, unembed and grow, with every matrix packed for few rows."""
        matrix = DecodeMatrix.of(self._matrix().astype(self.trunk.config.compute_dtype))

        @jax.named_scope("unembed")
        def unembed(hidden: Float[Array, "C D"]) -> Float[Array, "C V"]:
            return self._cap(matrix(hidden, promote_types(hidden.dtype, jnp.float32)))

        def grow(cache: KVCache, capacity: int) -> KVCache:
            self.trunk.check_positions(capacity)
            return cache.grown(capacity)

        return Decoder(self.trunk.decoder(), unembed, grow)

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Field -> its logical axes, for `sharding`."""
        return {"output": ("vocab", "embed")}

    def _cap(self, logits: Float[Array, "C V"]) -> Float[Array, "C V"]:
        return softcapped(logits, self.trunk.config.final_softcap)

    def _matrix(self) -> Float[Array, "V D"]:
        return self.trunk.embedding if self.output is None else self.output


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
    """A critic or a reward model: its own `trunk`, and a `head` with one number per slot."""

    trunk: Transformer
    head: ValueHead

    @classmethod
    def on(cls, trunk: Transformer) -> "ValueModel":
        """A critic on a trunk: the head starts at zero, so the first values are 0."""
        return cls(trunk, ValueHead(jnp.zeros(trunk.config.hidden_size, trunk.embedding.dtype)))

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int = 0
    ) -> Float[Array, "B rest"]:
        """Values after reading slots `start` to S - 1, reward units."""
        return self.head(self.trunk(tokens, mask, start))
