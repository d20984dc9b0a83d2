"""One query per head against a cache."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .products import wide_einsum
from .softmax_attention import plain_attend, scale_of, softcapped


def plain_attend_to_cache(
    query: Float[Array, "B *K group E"],
    keys: Float[Array, "B *K E S"],
    values: Float[Array, "B *K S E"],
    seen: Bool[Array, "B S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B *K group E"]:
    """`plain_attend` of one query; see `attend_to_cache`."""
    heads = query.shape[:-2] + (1,) * (4 - query.ndim)
    mixed = plain_attend(
        query.reshape(*heads, -1, 1, query.shape[-1]),
        keys.swapaxes(-1, -2).reshape(*heads, -1, query.shape[-1]),
        values.reshape(*heads, -1, query.shape[-1]),
        seen[:, None], scale=scale, softcap=softcap,
    )  # fmt: skip
    return mixed.reshape(query.shape)


def attend_to_cache(
    query: Float[Array, "B *K group E"],
    keys: Float[Array, "B *K E S"],
    values: Float[Array, "B *K S E"],
    seen: Bool[Array, "B S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B *K group E"]:
    """`attend` of one query per head, to keys and values in the layout of the cache.

    Args:
        query: grouped by the key/value head that they share; no axis K where there is one head.
        keys, values: the slots of a cache.
        seen: which of them each row's query sees.
        scale, softcap: as in `attend`.

    Returns:
        The mixed values, shape of `query`.
    """
    query = query * scale_of(scale, query.shape[-1])
    logits = softcapped(wide_einsum("...ge,...es->...gs", query, keys), softcap)
    seen = jnp.expand_dims(seen, range(1, logits.ndim - 1))
    logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mixed = wide_einsum("...gs,...se->...ge", weights.astype(values.dtype), values)
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(values.dtype)
