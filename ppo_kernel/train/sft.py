"""Supervised fine-tuning: next-token prediction."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..models.base import Policy
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
    """Log-probability of tokens 1.. given those before them, and which of them count.

    Args:
        policy: any `models.base.Policy`.
        tokens: the first token of a sequence is only read.
        mask: slots that hold a token.
        chunk_size: tokens through the output head at a time.

    Returns:
        (logprobs, mask), nats.
    """
    logprobs, _ = logprobs_from_hidden(
        policy.hidden(tokens, mask)[:, :-1], tokens[:, 1:], policy.unembed,
        temperature=1.0, chunk_size=chunk_size,
    )  # fmt: skip
    return logprobs, mask[:, 1:] & mask[:, :-1]


def next_token_loss(policy: Policy, parts: tuple[Batch, ...]) -> Float[Array, ""]:
    """Mean negative log-likelihood of every predicted token of a batch, nats a token.

    The `targets` are how many tokens at the start of a sequence, those of a prompt, are only read.
    """
    total, count = 0.0, 0.0
    for part in parts:
        # The logits of all tokens at once would be the largest array of the stage.
        logprobs, valid = next_token_logprobs(
            policy, part.tokens, part.mask, chunk_size=_CHUNK_SIZE
        )
        predicted = jnp.arange(1, part.tokens.shape[1], dtype=part.targets.dtype)
        valid = valid & (predicted[None] >= part.targets[:, None])
        total = total - masked_sum(logprobs, valid)
        count = count + jnp.sum(valid).astype(logprobs.dtype)
    return total / jnp.maximum(count, 1.0)


def perplexity(
    policy: Policy, sequences: Sequence[Sequence[int]], *, width: int, batch_size: int = 256
) -> float:
    """exp of the mean negative log-likelihood a token of whole sequences, cut at `width`."""

    @eqx.filter_jit
    def sums(policy, tokens, mask):
        logprobs, valid = next_token_logprobs(policy, tokens, mask)
        return masked_sum(logprobs, valid), jnp.sum(valid)

    total, count = 0.0, 0
    for tokens, mask in padded_batches(sequences, width, batch_size):
        part_total, part_count = sums(policy, tokens, mask)
        total, count = total + float(part_total), count + int(part_count)
    return float(jnp.exp(-total / max(count, 1)))
