"""Log-probabilities and entropies of tokens, from logits or from hidden states in chunks."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..types import Scalar
from .dtypes import upcast


def token_logprobs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Log-probability of each token under the softmax of its logits.

        log p(a) = z_a - m - log sum_v exp(z_v - m),   m = max z

    Args:
        logits: already tempered; -inf bans a token.
        tokens: ids in [0, V).

    Returns:
        Nats, at least float32, never above 0; -inf for a banned token.
    """
    logits = _shifted(logits)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return jnp.squeeze(chosen, axis=-1) - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))


def entropy(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Entropy of the softmax of `logits`.

        H = log sum_v exp(z_v - m) - sum_v p_v (z_v - m),   m = max z

    Args:
        logits: already tempered; a banned token (-inf) adds nothing.

    Returns:
        Nats, at least float32, in [0, log V].
    """
    logits = _shifted(logits)
    weights = jnp.exp(logits)
    total = jnp.sum(weights, axis=-1)
    # The where keeps 0 * -inf out of the value and of the gradient.
    finite = jnp.where(jnp.isneginf(logits), 0.0, logits)
    return jnp.log(total) - jnp.sum(weights * finite, axis=-1) / total


def _shifted(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """z - max z, at least float32. A likely token keeps its digits, since no large terms cancel."""
    logits = upcast(logits)
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


@jax.custom_vjp
def _logprobs_and_entropies(
    logits: Float[Array, "C V"], tokens: Int[Array, " C"], temperature: Float[Array, ""]
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """`token_logprobs` and `entropy` of z / T, in few passes over the logits.

        u = (z - max z) / T,   dz = (g (onehot(a) - p) - h p (log p + H)) / T,   dT = -sum u dz

    g and h are the gradients of log p(a) and of H. The backward pass keeps only the logits.
    """
    return _forward(logits, tokens, temperature)[0]


def _forward(logits, tokens, temperature):
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # Multiplied by 1 / T: XLA would write the quotients to memory, to read them twice.
    rate = 1.0 / temperature
    total, weighted = _weight_sums((logits - largest) * rate)
    log_total = jnp.log(total)[:, None]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    logprobs = (chosen - largest) * rate - log_total
    entropies = log_total - (weighted / total)[:, None]
    residuals = (logits, tokens, rate, largest, log_total, entropies)
    return (jnp.squeeze(logprobs, axis=1), jnp.squeeze(entropies, axis=1)), residuals


def _backward(residuals, gradients):
    logits, tokens, rate, largest, log_total, entropies = residuals
    logprob_slope, entropy_slope = (rate * gradient[:, None] for gradient in gradients)
    shifted = (logits - largest) * rate
    logp = shifted - log_total
    common = logprob_slope + entropy_slope * entropies
    slope = -jnp.exp(logp) * (common + entropy_slope * _finite(logp))
    taken = jnp.arange(logits.shape[-1], dtype=tokens.dtype)[None] == tokens[:, None]
    slope = jnp.where(taken, slope + logprob_slope, slope)
    return slope, None, -jnp.sum(slope * _finite(shifted))


_logprobs_and_entropies.defvjp(_forward, _backward)


def _finite(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """0 for -inf, so that its product with a probability of 0 is 0 and not NaN."""
    return jnp.where(jnp.isneginf(x), 0.0, x)


def _weight_sums(
    shifted: Float[Array, "C V"],
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """sum_v exp(u_v) and sum_v u_v exp(u_v) of each row."""
    return jax.lax.platform_dependent(shifted, cpu=_sums_in_blocks, default=_sums_apart)


def _sums_apart(shifted: Float[Array, "C V"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    weights = jnp.exp(shifted)
    return jnp.sum(weights, axis=-1), jnp.sum(weights * _finite(shifted), axis=-1)


def _sums_in_blocks(shifted: Float[Array, "C V"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Both sums in one reduction over blocks of columns, for CPUs.

    With two reductions XLA writes weights and products to memory. One reduction along rows is
    slower.
    """
    blocks = shifted.reshape(len(shifted), math.gcd(shifted.shape[1], 16), -1)
    weights = jnp.exp(blocks)
    pair = (weights, weights * _finite(blocks))
    zero = jnp.zeros((), shifted.dtype)
    sums = jax.lax.reduce(pair, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1,))
    return jnp.sum(sums[0], axis=-1), jnp.sum(sums[1], axis=-1)


def logprobs_from_hidden(
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    unembed: Callable[[Float[Array, "C D"]], Float[Array, "C V"]],
    *,
    temperature: Scalar,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each token and entropy of its distribution, without logits of [B, T, V].

        z = unembed(h) / temperature;   log p(a) as in `token_logprobs`;   H as in `entropy`

    `chunk_size` bounds memory: the head runs on a few response slots of all sequences at a time and
    again in the backward pass, so the largest temporary is [chunk_size, V]. Chunks cut T, never B,
    because B may be sharded.

    Args:
        hidden: final hidden states at the positions that predict `tokens`.
        tokens: ids in [0, V).
        unembed: the output head, [C, D] -> [C, V].
        temperature: > 0, divides the logits.
        chunk_size: tokens per chunk, at least one slot of every sequence; None for one chunk.

    Returns:
        (logprobs, entropies), nats, at least float32.

    Raises:
        ValueError: `chunk_size` is below 1.
    """

    def head(hidden: Float[Array, "B t D"], tokens: Int[Array, "B t"]):
        logits = upcast(unembed(hidden.reshape(-1, hidden.shape[-1])))
        temper = jnp.asarray(temperature).astype(logits.dtype)
        logprobs, entropies = _logprobs_and_entropies(logits, tokens.reshape(-1), temper)
        return logprobs.reshape(tokens.shape), entropies.reshape(tokens.shape)

    if chunk_size is None:
        return head(hidden, tokens)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token or None, got {chunk_size}.")
    batch, length = tokens.shape
    slots = max(1, chunk_size // batch)
    if slots >= length:
        return head(hidden, tokens)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -length % slots)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, slots, *x.shape[2:]), 1, 0)

    def join(x: Float[Array, "count B t"]) -> Float[Array, "B T"]:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]

    pairs = (split(hidden), split(tokens))
    logprobs, entropies = jax.lax.map(lambda pair: jax.checkpoint(head)(*pair), pairs)
    return join(logprobs), join(entropies)
