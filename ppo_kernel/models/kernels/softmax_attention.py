"""softmax(q k^T) v with a backward pass of its own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ...ops.dtypes import upcast
from .products import wide_einsum

KEPT = "attention"
"""What a `jax.checkpoint` policy calls the mixed values, and the maxima and sums of the softmax."""


def plain_attend(
    query: Float[Array, "B K group Q E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    allowed: Bool[Array, "B Q S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B K group Q E"]:
    """softmax(q k^T scale) v over the allowed slots; see `attend`."""
    query = query * scale_of(scale, query.shape[-1])
    logits = softcapped(wide_einsum("bkgqe,bkse->bkgqs", query, key), softcap)
    logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return wide_einsum("bkgqs,bkse->bkgqe", weights, value).astype(value.dtype)


def attend(
    query: Float[Array, "B K group Q E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    allowed: Bool[Array, "B Q S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B K group Q E"]:
    """softmax(z) v over the allowed slots, z = q k^T scale, or z = c tanh(q k^T scale / c).

    Source: Vaswani et al. 2017, eq. 1 (https://arxiv.org/abs/1706.03762); the soft-cap c as in
    Gemma 2 (https://arxiv.org/abs/2408.00118, sec. 2). The softmax is in at least float32. The
    backward pass takes the weights p from the maxima and sums of the forward pass, and makes fewer
    passes over [S, Q] than autodiff:

        dv = p^T do,   dp = do v^T,   dz = p (dp - sum(p dp)),   du = dz (1 - (z / c)^2) scale
        dq = du k,     dk = du^T q

    (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B.2). The gradient can be
    differentiated again, but there is no forward-mode derivative of the function itself.

    Args:
        query: grouped by the key/value head that they share.
        key, value: S slots of keys and values.
        allowed: which slots each query sees. A query that sees none gets the mean of all values,
            so that padding stays finite.
        scale: of the logits; None for 1 / sqrt(E).
        softcap: c; None for no cap.

    Returns:
        The mixed values, shape of `query`.
    """
    return _attend(scale_of(scale, query.shape[-1]), softcap, query, key, value, allowed)


def scale_of(scale: float | None, head_dim: int) -> float:
    """`scale`; None for 1 / sqrt(head_dim)."""
    return head_dim**-0.5 if scale is None else scale


def softcapped(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap tanh(logits / cap); None leaves them as they are."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, softcap, query, key, value, allowed):
    return _forward(scale, softcap, query, key, value, allowed)[0]


def _forward(scale, softcap, query, key, value, allowed):
    logits = _masked(_logits(scale, softcap, query, key), allowed, query)
    largest = jnp.max(logits, axis=2, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=2, keepdims=True)
    mixed = wide_einsum("bksx,bkse->bkxe", weights.astype(value.dtype), value)
    mixed = (mixed / _transpose(total)).astype(value.dtype).reshape(query.shape)
    mixed, largest, total = (checkpoint_name(x, KEPT) for x in (mixed, largest, total))
    return mixed, (query, key, value, allowed, largest, total)


def _backward(scale, softcap, residuals, cotangent):
    query, key, value, allowed, largest, total = residuals
    logits = _logits(scale, softcap, query, key)
    weights = jnp.exp(_masked(logits, allowed, query) - largest)
    share = (upcast(_merge_groups(cotangent)) / _transpose(total)).astype(value.dtype)
    value_gradient = jnp.einsum("bksx,bkxe->bkse", weights.astype(value.dtype), share)
    along = wide_einsum("bkse,bkxe->bksx", value, share)
    # sum(p dp) and not its equal sum(do o): a query that sees one slot then has no gradient, and
    # not a rounding error, which an optimizer such as Adam would magnify.
    along -= jnp.sum(weights * along, axis=2, keepdims=True) / total
    change = weights * along
    if softcap is not None:
        change = change * (1.0 - jnp.square(logits / softcap))
    change = jnp.where(_seen(allowed, query), change, 0.0).astype(query.dtype)
    query_gradient = jnp.einsum("bksx,bkse->bkxe", change, key).reshape(query.shape) * scale
    key_gradient = jnp.einsum("bksx,bkxe->bkse", change, _merge_groups(query * scale))
    return query_gradient, key_gradient, value_gradient, None


_attend.defvjp(_forward, _backward)


def _logits(scale, softcap, query, key):
    """[B, K, S, group Q], at least float32.

    The slots come first: most products of the two passes then read this large array in its own
    layout, where XLA's CPU backend would write a transposed copy.
    """
    logits = wide_einsum("bkse,bkxe->bksx", key, _merge_groups(query * scale))
    return softcapped(logits, softcap)


def _masked(logits, allowed, query):
    """`logits`, the lowest number where a slot is not allowed."""
    return jnp.where(_seen(allowed, query), logits, jnp.finfo(logits.dtype).min)


def _seen(allowed: Bool[Array, "B Q S"], query: Array) -> Bool[Array, "B 1 S groupQ"]:
    return jnp.tile(_transpose(allowed), (1, 1, query.shape[2]))[:, None]


def _merge_groups(x: Float[Array, "B K group Q E"]) -> Float[Array, "B K groupQ E"]:
    """All queries of a key's group on one axis."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)
