"""Drawing tokens: noise by coordinate, restriction of the support, inverse-CDF sampling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..types import Scalar

_BLOCK = 256
"""Vocabulary entries per block of the two-level draw; small enough that both scans are cheap."""


def sampling_noise(
    key: Key[Array, ""], sample_ids: Int[Array, " B"], num_tokens: int
) -> Float[Array, "B T 2"]:
    """Uniform noise keyed by coordinate: (key, sample id, token index), nothing else.

        u[b, t] = uniform(fold_in(fold_in(key, sample_ids[b]), t), shape [2])

    The noise of a sample does not depend on the batch, on its place there, or on the mesh.

    Args:
        key: the iteration's key; consumed.
        sample_ids: one id per sequence.
        num_tokens: T.

    Returns:
        Two uniforms in [0, 1) per token, float32. The first picks a block of the vocabulary, the
        second the token in it. A single uniform, a multiple of 2^-23, could not reach rare tokens.
    """

    def draw(sample_id: Int[Array, ""], t: Int[Array, ""]) -> Float[Array, "2"]:
        cell = jax.random.fold_in(jax.random.fold_in(key, sample_id), t)
        return jax.random.uniform(cell, (2,), jnp.float32)

    over_tokens = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_tokens, in_axes=(0, None))(sample_ids, jnp.arange(num_tokens))


def restrict_logits(
    logits: Float[Array, "B V"],
    *,
    top_k: int | None = None,
    top_p: Scalar | None = None,
    min_p: Scalar | None = None,
) -> Float[Array, "B V"]:
    """Ban (-inf) the tokens that top-k, then top-p, then min-p leave out; None switches one off.

        top-k: the k largest logits
        top-p: the smallest set of most likely tokens with sum_v p_v >= top_p
        min-p: the tokens with p_v >= min_p max p

    All ties at a threshold are kept. The most likely token is always kept.

    Sources: top-k, Fan et al. 2018, https://arxiv.org/abs/1805.04833; top-p, Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751; min-p, Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.

    Args:
        logits: tempered, -inf where already banned.
        top_k: at least 1; static.
        top_p: in (0, 1].
        min_p: in [0, 1].

    Returns:
        Logits with the rest at -inf.

    Raises:
        ValueError: `top_k` is below 1.
    """
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}.")
        logits = _keep_while(logits, jnp.ones_like(logits), jnp.asarray(top_k, logits.dtype))
    if top_p is not None:
        mass = jax.nn.softmax(logits, axis=-1)
        bound = jnp.asarray(top_p).astype(mass.dtype)
        # The sum may round to 1 before the tail; a bound of 1 must keep the tail too.
        logits = _keep_while(logits, mass, jnp.where(bound < 1.0, bound, jnp.inf))
    if min_p is not None:
        largest = jnp.max(logits, axis=-1, keepdims=True)
        floor = largest + jnp.log(jnp.asarray(min_p).astype(logits.dtype))
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def _keep_while(
    logits: Float[Array, "B V"], weights: Float[Array, "B V"], bound: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Keep a token if the more likely ones together weigh less than `bound`; ban the others.

    Bisection over the bits of a float finds the least logit that is kept: floats order as their
    bits do. It is exact, reads the vocabulary once per bit, and is some 20 times as fast as a sort
    on a CPU (bench/RESULTS.md).
    """
    ordered, bits = _as_integers(logits)

    def halve(_, interval):
        low, high = interval
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        above = jnp.sum(jnp.where(ordered > middle, weights, 0.0), axis=-1, keepdims=True)
        kept = above < bound
        return jnp.where(kept, low, middle), jnp.where(kept, middle, high)

    high = jnp.max(ordered, axis=-1, keepdims=True)
    low = jnp.full_like(high, jnp.iinfo(high.dtype).min)
    _, least = jax.lax.fori_loop(0, bits, halve, (low, high))
    return jnp.where(ordered >= least, logits, -jnp.inf)


def _as_integers(x: Float[Array, "*shape"]) -> tuple[Int[Array, "*shape"], int]:
    """(integers that order as the floats do, bits of each); -0 counts as 0."""
    bits = x.dtype.itemsize * 8
    integers = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.dtype(f"int{bits}"))
    # A larger magnitude makes a negative float smaller: mirror all bits but the sign.
    mirrored = integers ^ jnp.iinfo(integers.dtype).max
    return jnp.where(integers < 0, mirrored, integers), bits


def ban_tokens(
    logits: Float[Array, "B V"], token_ids: tuple[int, ...], where: Bool[Array, "*rows"]
) -> Float[Array, "B V"]:
    """Set the logits of `token_ids` to -inf where `where` is true: one flag, or one per row.

    The ban of EOS before `min_new_tokens` uses it.
    """
    banned = jnp.zeros((1, logits.shape[-1]), bool).at[:, jnp.array(token_ids, int)].set(True)
    banned = jnp.broadcast_to(banned & where.reshape(-1, 1), logits.shape)
    return jnp.where(banned, -jnp.inf, logits)


def sample_tokens(
    logits: Float[Array, "B V"], noise: Float[Array, "B 2"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token per row from the softmax of `logits`, by inverse CDF in two levels.

        w = exp(z - max z);   block = first j with C_j > u_0 C_last  (C: running sum of block sums)
        token = first i in the block with c_i > u_1 c_last           (c: running sum of w)
        log p = z_token - max z - log C_last

    It reads the vocabulary once and needs two random numbers per token; Gumbel-max needs V. A token
    of weight 0 is never drawn.

    Args:
        logits: tempered and restricted; -inf bans.
        noise: uniforms in [0, 1).

    Returns:
        (tokens, logprobs): int32 ids, and their log-probabilities, nats.
    """
    vocabulary = logits.shape[-1]
    block = min(_BLOCK, vocabulary)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % block)))
    weights = weights.reshape(weights.shape[0], -1, block)
    for_block, for_token = jnp.unstack(noise, axis=1)
    which, total = _first_above(jnp.sum(weights, axis=-1), for_block)
    inside = jnp.take_along_axis(weights, which[:, None, None], axis=1)
    tokens = which * block + _first_above(jnp.squeeze(inside, axis=1), for_token)[0]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - largest
    return tokens, jnp.squeeze(chosen, axis=-1) - jnp.log(total)


def _first_above(
    weights: Float[Array, "B X"], uniform: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(First index whose running sum exceeds `uniform` times the total, the total).

    A parallel running sum adds in another order at every entry: by rounding it may rise where the
    weight is 0, and fall after it. So entries of weight 0 are left out, the total is the largest of
    the others, and the threshold stays strictly below it.
    """
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    total = jnp.max(running, axis=-1)
    below = jnp.nextafter(total, jnp.full_like(total, -jnp.inf))
    threshold = jnp.minimum(uniform.astype(total.dtype) * total, below)
    above = running > threshold[:, None]
    return jnp.argmax(above, axis=-1).astype(jnp.int32), total
