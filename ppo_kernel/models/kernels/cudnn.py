"""Causal attention by cuDNN; the plain form is `plain_attend_causally`."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cudnn_attention(
    query: Float[Array, "B K group S E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    mask: Bool[Array, "B S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B K group S E"]:
    """`attend_causally` by cuDNN's flash attention: no array [S, S].

    Source: Dao et al. 2022 (https://arxiv.org/abs/2205.14135).

    `TransformerConfig(attention=cudnn_attention)`, for NVIDIA GPUs from Ampere on.

    Args:
        query, key, value: bfloat16 or float16.
        mask: which slots hold a token.
        scale, window: as in `attend_causally`.
        softcap: None; cuDNN has no soft-cap here.

    Returns:
        The mixed values, shape of `query`; 0 where there is no token.

    Raises:
        ValueError: another type, or a soft-cap.
        RuntimeError: JAX finds no cuDNN.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"cudnn_attention takes bfloat16 or float16, got {query.dtype}: set "
            'compute_dtype="bfloat16", or leave the default attend_causally.'
        )
    return attend_by_lengths(
        query, key, value, mask, implementation="cudnn", scale=scale, softcap=softcap,
        window=window,
    )  # fmt: skip


def attend_by_lengths(
    query: Float[Array, "B K group S E"],
    key: Float[Array, "B K S E"],
    value: Float[Array, "B K S E"],
    mask: Bool[Array, "B S"],
    *,
    implementation: Literal["xla", "cudnn"],
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Array, "B K group S E"]:
    """Causal attention by `jax.nn.dot_product_attention`, whose kernels mask by lengths alone.

    The tokens of each row are moved to its front and back again. Their order stays, and with it
    what each of them sees.

    Args:
        query, key, value: as in `attend_causally`.
        mask: which slots hold a token.
        implementation: of `jax.nn.dot_product_attention`.
        scale, window: as in `attend_causally`.
        softcap: None; those kernels have none.

    Returns:
        The mixed values, shape of `query`; 0 where there is no token.

    Raises:
        ValueError: a soft-cap.
    """
    if softcap is not None:
        raise ValueError(
            f"fused attention has no soft-cap, but a layer asks for softcap={softcap}: leave the "
            "default attend_causally."
        )
    batch, _, _, slots, width = query.shape
    order = jnp.argsort(~mask, axis=1, stable=True)
    # An even number of slots: for odd ones JAX has no gradient of the kernel.
    source = jnp.pad(order, ((0, 0), (0, slots % 2)))
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    mixed = jax.nn.dot_product_attention(
        _take(query.reshape(batch, -1, slots, width).swapaxes(1, 2), source),
        _take(key.swapaxes(1, 2), source),
        _take(value.swapaxes(1, 2), source),
        is_causal=True,
        scale=scale,
        # Tokens are contiguous at the front: a distance in slots is one in positions.
        local_window_size=None if window is None else (window - 1, 0),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    mixed = _take(mixed, jnp.argsort(order, axis=1)).swapaxes(1, 2).reshape(query.shape)
    # Behind the lengths a kernel leaves undefined numbers.
    return jnp.where(mask[:, None, None, :, None], mixed, jnp.zeros((), mixed.dtype))


def _take(x: Float[Array, "B S X E"], order: Int[Array, "B Z"]) -> Float[Array, "B Z X E"]:
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)
