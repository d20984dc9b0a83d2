"""Grouped-query attention: over a whole sequence, and one token against the cache."""

from collections.abc import Callable
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ..ops.dtypes import upcast
from .kernels.products import wide_einsum
from .kv_cache import without_lone_head, write_slots
from .layers import Linear, RMSNorm, Rotation, for_few_rows, rotate, side_by_side


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
        projected = side_by_side(x, (self.query, self.key, self.value))
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
        inputs = for_few_rows(self.query, self.key, self.value)
        output = for_few_rows(self.output)

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


def attend_causally(
    query: Float[Array, "B K group S E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    mask: Bool[Array, "B S"],
) -> Float[Array, "B K group S E"]:
    """`attend`, where each slot sees the valid slots up to and with itself.

    Each block of queries meets the keys up to its own end alone: with four blocks 3/8 of the square
    [S, S] is never computed, with eight 7/16.

    Args:
        query, key, value: as in `attend`, of the same S slots.
        mask: which slots hold a token.

    Returns:
        The mixed values, shape of `query`.
    """
    # Made once: each block would turn around its own part of what the projections wrote.
    query, key, value = jax.lax.optimization_barrier((query, key, value))
    length = mask.shape[1]
    blocks = max(1, *(min(most, length // queries) for most, queries in _BLOCKS))
    bounds = [length * n // blocks for n in range(blocks + 1)]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mixed = [
        attend(
            query[:, :, :, start:end],
            key[:, :, :end],
            value[:, :, :end],
            causal[None, start:end, :end] & mask[:, None, :end],
        )
        for start, end in pairwise(bounds)
    ]
    return mixed[0] if blocks == 1 else jnp.concatenate(mixed, axis=3)


_BLOCKS = (4, 48), (8, 128)
"""So many blocks where each has so many queries: what narrower products cost is more than what they
leave out, and more blocks take longer to compile."""


@jax.custom_vjp
def attend(
    query: Float[Array, "B K group Q E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    allowed: Bool[Array, "B Q S"],
) -> Float[Array, "B K group Q E"]:
    """softmax(q k^T / sqrt(E)) v over the allowed slots.

    The softmax is in at least float32. A query with nothing allowed gets the mean of all values:
    finite, and never read, since only padding is in that place. The backward pass takes the weights
    from their maximum and sum, with fewer passes over [S, Q] than autodiff makes:

        dp = do v^T,   dz = p (dp - sum(p dp)),   dq = dz k / sqrt(E),   dk = dz^T q / sqrt(E)

    and dv = p^T do. Forward-mode derivatives alone do not exist; those of a gradient do.

    Sources: Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762; Dao et al. 2022,
    appendix B.2, https://arxiv.org/abs/2205.14135.

    Args:
        query: grouped by the key/value head they share.
        key, value: slots of keys and values.
        allowed: which slots each query sees.

    Returns:
        The mixed values, shape of `query`.
    """
    return _attend_forward(query, key, value, allowed)[0]


KEPT = "attention"
"""What a `jax.checkpoint` policy calls the mixed values, and the maxima and sums of the softmax."""


def _attend_forward(query, key, value, allowed):
    logits = _logits(query, key, allowed)
    largest = jnp.max(logits, axis=2, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=2, keepdims=True)
    mixed = wide_einsum("bksx,bkse->bkxe", weights.astype(value.dtype), value)
    mixed = (mixed / _turned(total)).astype(value.dtype).reshape(query.shape)
    mixed, largest, total = (checkpoint_name(x, KEPT) for x in (mixed, largest, total))
    return mixed, (query, key, value, allowed, largest, total)


def _attend_backward(residuals, cotangent):
    query, key, value, allowed, largest, total = residuals
    weights = jnp.exp(_logits(query, key, allowed) - largest)
    share = (upcast(_joint(cotangent)) / _turned(total)).astype(value.dtype)
    value_gradient = jnp.einsum("bksx,bkxe->bkse", weights.astype(value.dtype), share)
    along = wide_einsum("bkse,bkxe->bksx", value, share)
    # sum(p dp) and not its equal sum(do o): a query that sees one slot then has no gradient, and
    # not a rounding error, which an optimizer such as Adam would magnify.
    along -= jnp.sum(weights * along, axis=2, keepdims=True) / total
    change = jnp.where(_seen(allowed, query), weights * along, 0.0).astype(query.dtype)
    scale = query.shape[-1] ** -0.5
    query_gradient = jnp.einsum("bksx,bkse->bkxe", change, key).reshape(query.shape) * scale
    key_gradient = jnp.einsum("bksx,bkxe->bkse", change, _joint(query * scale))
    return query_gradient, key_gradient, value_gradient, None


attend.defvjp(_attend_forward, _attend_backward)


def _logits(query, key, allowed):
    """[B, K, S, group Q], at least float32; the lowest number where a slot is not allowed.

    The slots come first: most products of the two passes then take this large array as it lies,
    where XLA's CPU backend would write it anew, turned around.
    """
    scale = query.shape[-1] ** -0.5
    logits = wide_einsum("bkse,bkxe->bksx", key, _joint(query * scale))
    return jnp.where(_seen(allowed, query), logits, jnp.finfo(logits.dtype).min)


def _seen(allowed: Bool[Array, "B Q S"], query: Array) -> Bool[Array, "B 1 S groupQ"]:
    return jnp.tile(_turned(allowed), (1, 1, query.shape[2]))[:, None]


def _joint(x: Float[Array, "B K group Q E"]) -> Float[Array, "B K groupQ E"]:
    """All queries of a key's group side by side."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _turned(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def attend_to_cache(
    query: Float[Array, "B *K group E"],
    keys: Float[Array, "B *K E S"],
    values: Float[Array, "B *K S E"],
    mask: Bool[Array, "B S"],
) -> Float[Array, "B *K group E"]:
    """`attend` of one query a head, to keys that lie as the cache has them; no gradient needed.

    Args:
        query: grouped by the key/value head they share.
        keys, values: the slots of a cache.
        mask: which of them hold a token.

    Returns:
        The mixed values, shape of `query`.
    """
    logits = wide_einsum("...ge,...es->...gs", query * query.shape[-1] ** -0.5, keys)
    seen = jnp.expand_dims(mask, range(1, logits.ndim - 1))
    logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mixed = wide_einsum("...gs,...se->...ge", weights.astype(values.dtype), values)
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(values.dtype)
