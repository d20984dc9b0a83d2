"""Supervised fine-tuning: next-token prediction."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..models.protocol import Policy
from ..ops.logprobs import logprobs_from_hidden
from ..ops.masked import masked_sum
from .supervised import Batch, padded_batches

_CHUNK_SIZE = 1024


def next_token_logprobs(
    policy: Policy,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B S-1"], Bool[Array, "B S-1"]]:
    """log p(token t | tokens before t) for t >= 1.

    Args:
        policy: any `models.protocol.Policy`.
        tokens: the first token of a sequence is context only.
        mask: slots that hold a token.
        chunk_size: tokens through the output head at a time.

    Returns:
        (logprobs in nats, mask of the tokens that count).
    """
    logprobs, _ = logprobs_from_hidden(
        policy.hidden(tokens, mask)[:, :-1], tokens[:, 1:], policy.unembed,
        temperature=1.0, chunk_size=chunk_size,
    )  # fmt: skip
    return logprobs, mask[:, 1:] & mask[:, :-1]


def predicted_logprobs(
    policy: Policy, batch: Batch
) -> tuple[Float[Array, "B rest"], Bool[Array, "B rest"]]:
    """`next_token_logprobs` of a batch, with a mask of the tokens that are trained on.

    `batch.targets` has the number of tokens at the start of each sequence, those of a prompt, that
    are context only.
    """
    # The logits of all tokens at once would be the largest array of the stage.
    logprobs, valid = next_token_logprobs(policy, batch.tokens, batch.mask, chunk_size=_CHUNK_SIZE)
    slots = jnp.arange(1, batch.tokens.shape[1], dtype=batch.targets.dtype)
    return logprobs, valid & (slots[None] >= batch.targets[:, None])


def next_token_loss(policy: Policy, parts: tuple[Batch, ...]) -> Float[Array, ""]:
    """Mean negative log-likelihood of the tokens that are trained on, nats per token."""
    total, count = 0.0, 0.0
    for part in parts:
        logprobs, valid = predicted_logprobs(policy, part)
        total = total - masked_sum(logprobs, valid)
        count = count + jnp.sum(valid).astype(logprobs.dtype)
    return total / jnp.maximum(count, 1.0)


def perplexity(
    policy: Policy,
    sequences: Sequence[Sequence[int]],
    num_read: Sequence[float] | None = None,
    *,
    width: int,
    batch_size: int = 256,
) -> float:
    """exp(mean negative log-likelihood per token) of sequences cut at `width`.

    Args:
        policy: to be measured.
        sequences: token ids.
        num_read: tokens at the start of each sequence that are context only; None for one.
        width: slots of a sequence.
        batch_size: sequences at a time.

    Returns:
        The perplexity, at least 1.
    """

    @eqx.filter_jit
    def sums(policy: Policy, batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
        logprobs, valid = predicted_logprobs(policy, batch)
        return masked_sum(logprobs, valid), jnp.sum(valid)

    total, count = 0.0, 0
    read = np.zeros(len(sequences)) if num_read is None else np.asarray(num_read)
    for index, (tokens, mask) in enumerate(padded_batches(sequences, width, batch_size)):
        part = read[index * batch_size : (index + 1) * batch_size]
        targets = jnp.asarray(np.pad(part, (0, batch_size - len(part))), jnp.float32)
        part_total, part_count = sums(policy, Batch(tokens, mask, targets))
        total, count = total + float(part_total), count + int(part_count)
    return float(np.exp(-total / max(count, 1)))
