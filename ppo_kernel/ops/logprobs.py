"""Log-probabilities and entropies of tokens, from logits or from hidden states in chunks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..types import Scalar
from .masked import at_least_float32


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
    """z - max z in at least float32. After it nothing cancels: a likely token keeps its digits."""
    logits = at_least_float32(logits)
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


@jax.custom_vjp
def _logprobs_and_entropies(
    logits: Float[Array, "C V"], tokens: Int[Array, " C"]
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """`token_logprobs` and `entropy`, whose gradient reads the logits once and keeps nothing else.

    dz = g (onehot(a) - p) - h p (log p + H),   g and h the gradients of log p(a) and of H
    """
    return token_logprobs(logits, tokens), entropy(logits)


def _forward(logits, tokens):
    outputs = token_logprobs(logits, tokens), entropy(logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True))
    return outputs, (logits, tokens, largest, log_total, outputs[1])


def _backward(residuals, gradients):
    logits, tokens, largest, log_total, entropies = residuals
    logprob_slope, entropy_slope = (gradient[:, None] for gradient in gradients)
    logp = logits - largest - log_total
    probabilities = jnp.exp(logp)
    taken = jax.nn.one_hot(tokens, logits.shape[-1], dtype=logp.dtype)
    # A banned token has no probability: the where keeps 0 * -inf out.
    surprise = jnp.where(jnp.isneginf(logp), 0.0, logp) + entropies[:, None]
    towards = logprob_slope * (taken - probabilities)
    return towards - entropy_slope * probabilities * surprise, None


_logprobs_and_entropies.defvjp(_forward, _backward)


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

    With `chunk_size` a few response slots of all sequences pass the output head at a time, in the
    forward and again in the backward pass, so the largest temporary is [chunk_size, V]. Chunks cut
    T and not B, which may be sharded over devices.

    Args:
        hidden: final hidden states at the positions that predict `tokens`.
        tokens: ids in [0, V).
        unembed: the output head, rows of hidden states to rows of logits.
        temperature: > 0, divides the logits.
        chunk_size: tokens a chunk, at least one slot of every sequence; None takes all at once.

    Returns:
        (logprobs, entropies), nats, at least float32.

    Raises:
        ValueError: `chunk_size` is below 1.
    """

    def head(hidden: Float[Array, "B t D"], tokens: Int[Array, "B t"]):
        logits = at_least_float32(unembed(hidden.reshape(-1, hidden.shape[-1])))
        logits = logits / jnp.asarray(temperature).astype(logits.dtype)
        logprobs, entropies = _logprobs_and_entropies(logits, tokens.reshape(-1))
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
