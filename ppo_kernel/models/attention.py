"""Grouped-query attention: over a whole sequence, and one token against the cache."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int

from .kernels.cached_attention import attend_to_cache
from .kernels.rotary import Rotation, rotate
from .kv_cache import without_lone_head, write_slots
from .linear import Linear, decoding, project
from .norm import RMSNorm


class Attention(eqx.Module):
    """Projections of grouped-query attention, with optional q/k norms.

    Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    num_kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)

    def project(
        self,
        x: Float[Array, "*batch D"],
        rotation: Rotation,
    ) -> tuple[Float[Array, "*batch H E"], Float[Array, "*batch K E"], Float[Array, "*batch K E"]]:
        """Queries, keys (both rotated) and values of each token."""
        projected = project(x, self.query, self.key, self.value)
        return self._by_head(projected, rotation)

    def _by_head(self, projected: tuple[Array, ...], rotation: Rotation):
        query, key, value = (x.reshape(*x.shape[:-1], -1, self.head_dim) for x in projected)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, rotation), rotate(key, rotation), value

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"],
        rotation: Rotation,
        mix: Callable[..., Float[Array, "B K group S E"]],
        start: int = 0,
    ) -> tuple[Float[Array, "B rest D"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
        """Causal attention by `mix` over the valid slots, from slot `start` on.

        Also the keys and values of all slots, for a cache.
        """
        query, key, value = self.project(x, rotation)
        mixed = mix(
            self._grouped(query).transpose(0, 2, 3, 1, 4),
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            mask,
        )
        mixed = mixed[:, :, :, start:].transpose(0, 3, 1, 2, 4)
        return self.output(mixed.reshape(*mixed.shape[:2], -1)), key, value

    def decoder(self) -> Callable:
        """One token a row against the cache; asked for once, outside the decode loop.

        It takes rows [B, D], their rotation, the buffers of a layer (see `KVCache`), their mask
        [B, S] and the slot to write, and returns rows [B, D] and the buffers with the slot written.
        """
        inputs = decoding(self.query, self.key, self.value)
        output = decoding(self.output)

        @jax.named_scope("attention")
        def apply(
            x: Float[Array, "B D"],
            rotation: Rotation,
            keys: Float[Array, "B *K E S"],
            values: Float[Array, "B *K S E"],
            mask: Bool[Array, "B S"],
            slot: Int[Array, ""],
        ) -> tuple[Float[Array, "B D"], Float[Array, "B *K E S"], Float[Array, "B *K S E"]]:
            query, key, value = self._by_head(inputs(x), rotation)
            query, key, value = map(without_lone_head, (self._grouped(query), key, value))
            keys, values = write_slots(keys, values, key, value, slot)
            mixed = attend_to_cache(query, keys.astype(x.dtype), values.astype(x.dtype), mask)
            return output(mixed.reshape(x.shape[0], -1))[0], keys, values

        return apply

    def _grouped(self, query: Float[Array, "*batch H E"]) -> Float[Array, "*batch K group E"]:
        return query.reshape(*query.shape[:-2], self.num_kv_heads, -1, self.head_dim)
