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

    With `chunk_size` the tokens pass the output head that many at a time, in the forward and
    again in the backward pass, so the largest temporary is [chunk_size, V].

    Args:
        hidden: final hidden states at the positions that predict `tokens`.
        tokens: ids in [0, V).
        unembed: the output head, rows of hidden states to rows of logits.
        temperature: > 0, divides the logits.
        chunk_size: tokens a chunk; None takes all at once.

    Returns:
        (logprobs, entropies), nats, at least float32.

    Raises:
        ValueError: `chunk_size` is below 1.
    """

    def head(rows: Float[Array, "C D"], ids: Int[Array, " C"]):
        logits = at_least_float32(unembed(rows))
        logits = logits / jnp.asarray(temperature).astype(logits.dtype)
        return token_logprobs(logits, ids), entropy(logits)

    rows, ids = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    if chunk_size is None or chunk_size >= rows.shape[0]:
        logprobs, entropies = head(rows, ids)
        return logprobs.reshape(tokens.shape), entropies.reshape(tokens.shape)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token or None, got {chunk_size}.")
    count = -(-rows.shape[0] // chunk_size)
    padding = count * chunk_size - rows.shape[0]
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(count, chunk_size, -1)
    ids = jnp.pad(ids, (0, padding)).reshape(count, chunk_size)
    chunks = jax.lax.map(lambda pair: jax.checkpoint(head)(*pair), (rows, ids))
    logprobs, entropies = (x.reshape(-1)[: tokens.size] for x in chunks)
    return logprobs.reshape(tokens.shape), entropies.reshape(tokens.shape)
