"""Laws of log-probabilities and entropies beyond their twins."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ppo_kernel.ops.logprobs import (
    _sums_apart,
    _sums_in_blocks,
    entropy,
    logprobs_from_hidden,
    token_logprobs,
)
from ppo_kernel.sharding import make_mesh, place
from ppo_kernel.testing import TOLERANCES, logits, reals, repadded_responses, token_ids

VOCABULARY, WIDTH, SHAPE = 7, 3, (4, 6)
IN_BLOCKS = 24
"""A vocabulary that has a divisor in common with 16, whose sums CPUs take in blocks."""


@given(logits((8, VOCABULARY)))
def test_entropy_is_between_0_and_log_of_the_support(z):
    h = np.asarray(entropy(jnp.asarray(z, jnp.float32)))
    assert (h >= 0).all()
    assert (h <= np.log(np.isfinite(z).sum(axis=-1)) + 1e-6).all()


def test_entropy_at_its_bounds():
    z = jnp.array([[2.0] * 4, [0.0, -jnp.inf, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(entropy(z), [np.log(4), 0], rtol=1e-6)


@given(logits((8, VOCABULARY)), token_ids((8,), VOCABULARY))
def test_logprobs_are_never_above_0_and_sum_to_1(z, tokens):
    z = jnp.asarray(z, jnp.float32)
    assert (np.asarray(token_logprobs(z, jnp.asarray(tokens))) <= 0).all()
    each = [token_logprobs(z, jnp.full(8, v)) for v in range(VOCABULARY)]
    np.testing.assert_allclose(np.exp(each).sum(axis=0), 1, rtol=1e-6)


@given(logits((8, VOCABULARY)), token_ids((8,), VOCABULARY))
def test_gradients_are_finite_and_those_of_the_softmax(z, tokens):
    spared = np.take_along_axis(z, tokens[:, None], axis=-1)
    np.put_along_axis(z, tokens[:, None], np.where(np.isinf(spared), 0, spared), axis=-1)
    z, tokens = jnp.asarray(z, jnp.float32), jnp.asarray(tokens)
    slope = jax.grad(lambda z: token_logprobs(z, tokens).sum())(z)
    expected = jax.nn.one_hot(tokens, VOCABULARY) - jax.nn.softmax(z)
    np.testing.assert_allclose(slope, expected, *TOLERANCES["float32"])
    # dH/dz = -p (log p + H); a banned or vanishing token adds nothing.
    p, logp = jax.nn.softmax(z), jax.nn.log_softmax(z)
    surprise = jnp.where(p > 0, logp, 0.0) + entropy(z)[:, None]
    slope = jax.grad(lambda z: entropy(z).sum())(z)
    np.testing.assert_allclose(slope, -p * surprise, *TOLERANCES["float32"])


@given(logits((8, IN_BLOCKS)), token_ids((8,), IN_BLOCKS))
def test_the_joint_gradient_is_that_of_its_parts(float64, z, tokens):
    """Banned tokens included, taken or not."""
    z, tokens = jnp.asarray(z), jnp.asarray(tokens)

    def joint(z):
        logprobs, entropies = logprobs_from_hidden(
            z[None], tokens[None], lambda rows: rows, temperature=1.0
        )
        return jnp.sum(2.0 * jnp.exp(logprobs) - 3.0 * entropies)

    def parts(z):
        return jnp.sum(2.0 * jnp.exp(token_logprobs(z, tokens)) - 3.0 * entropy(z))

    np.testing.assert_allclose(jax.grad(joint)(z), jax.grad(parts)(z), *TOLERANCES["float64"])


@pytest.mark.parametrize("sums", [_sums_apart, _sums_in_blocks])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, IN_BLOCKS])
def test_the_sums_are_the_same_on_every_platform(float64, sums, vocabulary):
    """Accelerators take them apart, CPUs in blocks; here both run."""
    u = np.random.default_rng(0).normal(size=(5, vocabulary))
    u[1, 2:] = -np.inf
    total, weighted = sums(jnp.asarray(u))
    np.testing.assert_allclose(total, np.exp(u).sum(axis=1), rtol=1e-14)
    expected = np.where(np.isfinite(u), u, 0) * np.exp(u)
    np.testing.assert_allclose(weighted, expected.sum(axis=1), rtol=1e-13)


def test_a_likely_token_keeps_its_digits_under_large_logits():
    z, rare = jnp.array([1000.0, 992.0]), np.exp(-8) / (1 + np.exp(-8))
    np.testing.assert_allclose(token_logprobs(z, jnp.array(0)), np.log1p(-rare), rtol=1e-3)
    np.testing.assert_allclose(entropy(z), np.log1p(np.exp(-8)) + 8 * rare, rtol=1e-3)


def loss(parameters, tokens, chunk_size):
    hidden, weight, temperature = parameters
    logprobs, entropies = logprobs_from_hidden(
        hidden, tokens, lambda rows: rows @ weight, temperature=temperature, chunk_size=chunk_size
    )
    return jnp.sum(logprobs**2) + jnp.sum(jnp.cos(entropies)), (logprobs, entropies)


def naive_loss(parameters, tokens):
    """The same of all logits at once, without a line of the kernel."""
    hidden, weight, temperature = parameters
    logp = jax.nn.log_softmax(hidden @ weight / temperature)
    logprobs = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    entropies = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return jnp.sum(logprobs**2) + jnp.sum(jnp.cos(entropies)), (logprobs, entropies)


naive = jax.jit(jax.value_and_grad(naive_loss, has_aux=True))
judged = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="chunk_size")


@pytest.mark.parametrize(
    ("chunk_size", "vocabulary"),
    [(size, VOCABULARY) for size in (None, 1, 5, 8, 23, 24, 100)] + [(None, IN_BLOCKS)],
)
@given(reals((*SHAPE, WIDTH), 1), reals((WIDTH, IN_BLOCKS), 1), token_ids(SHAPE, VOCABULARY))
def test_law_7_fused_and_chunked_is_the_naive_one(
    float64, chunk_size, vocabulary, hidden, weight, tokens
):
    """Log-probabilities, entropies, and gradients of both to states, weight and temperature."""
    weight = weight[:, :vocabulary]
    parameters, tokens = tuple(map(jnp.asarray, (hidden, weight, 0.7))), jnp.asarray(tokens)
    results = naive(parameters, tokens), judged(parameters, tokens, chunk_size=chunk_size)
    for expected, shipped in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(shipped, expected, *TOLERANCES["float64"])


def test_no_chunk_holds_more_than_its_share_of_logits():
    def largest(chunk_size):
        sizes = []

        def unembed(rows):
            sizes.append(rows.shape[0])
            return rows @ jnp.ones((WIDTH, VOCABULARY))

        logprobs_from_hidden(
            jnp.ones((*SHAPE, WIDTH)), jnp.zeros(SHAPE, int), unembed,
            temperature=1.0, chunk_size=chunk_size,
        )  # fmt: skip
        return max(sizes)

    # A slot of four sequences is the least.
    assert [largest(c) for c in (None, 1, 5, 8, 23, 24)] == [24, 4, 4, 8, 20, 24]


def test_there_are_no_more_chunks_than_tokens_ask_for():
    def head(hidden):
        return logprobs_from_hidden(
            hidden, jnp.zeros(SHAPE, int), lambda rows: rows, temperature=1.0, chunk_size=17
        )

    assert re.search(
        r"length=2\s", str(jax.make_jaxpr(head)(jnp.ones((*SHAPE, WIDTH))))
    )  # 24 tokens


def test_chunks_of_a_sharded_batch_stay_on_their_devices():
    hidden, tokens = place((jnp.ones((8, 6, WIDTH)), jnp.zeros((8, 6), int)), make_mesh(8), "batch")
    weight = jnp.ones((WIDTH, VOCABULARY))

    def total(hidden):
        logprobs, entropies = logprobs_from_hidden(
            hidden, tokens, lambda rows: rows @ weight, temperature=1.0, chunk_size=16
        )
        return jnp.sum(logprobs + entropies)

    program = jax.jit(jax.grad(total)).lower(hidden).compile().as_text()
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in program


def test_the_temperature_divides_logits_that_are_wide_already():
    """Dividing in bfloat16 would round once more."""
    logits_ = jnp.linspace(-9.0, 9.0, 7).astype(jnp.bfloat16)
    hidden = jnp.ones((1, 7, 1), jnp.bfloat16)
    tokens = jnp.arange(7)[None]
    got, _ = logprobs_from_hidden(
        hidden, tokens, lambda rows: rows * logits_[None], temperature=0.7, chunk_size=None
    )
    exact = jax.nn.log_softmax(logits_.astype(jnp.float32) / jnp.float32(0.7))
    np.testing.assert_allclose(got[0], exact, *TOLERANCES["float32"])


def test_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match="got 0"):
        logprobs_from_hidden(
            jnp.ones((1, 2, 3)), jnp.zeros((1, 2), int), lambda rows: rows,
            temperature=1.0, chunk_size=0,
        )  # fmt: skip


@given(repadded_responses(SHAPE, VOCABULARY), reals((*SHAPE, VOCABULARY)))
def test_pad_id_does_not_reach_valid_tokens(response, z):
    mask, *padded = response
    results = [token_logprobs(jnp.asarray(z), jnp.asarray(tokens)) for tokens in padded]
    np.testing.assert_array_equal(*[np.asarray(x)[mask] for x in results])
