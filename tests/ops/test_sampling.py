"""Laws of the noise, the restriction of the support and the draw."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from twins import sparse_logits

from ppo_kernel.ops.logprobs import token_logprobs
from ppo_kernel.ops.sampling import ban_tokens, restrict_logits, sample_tokens, sampling_noise
from ppo_kernel.testing import TOLERANCES, logits

LAST = 1 - 2**-24
"""The largest float32 below 1."""

draw = jax.jit(sample_tokens)
ids = st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4, unique=True)


def noise_of(sample_ids, num_tokens=3, seed=0):
    return np.asarray(sampling_noise(jax.random.key(seed), jnp.asarray(sample_ids), num_tokens))


@given(ids, st.permutations(range(4)))
def test_noise_depends_on_the_sample_id_alone(sample_ids, order):
    noise, order = noise_of(sample_ids), np.asarray(order)
    np.testing.assert_array_equal(noise_of(np.asarray(sample_ids)[order]), noise[order])
    strangers = [sample_ids[0], 1, 2, 3]
    np.testing.assert_array_equal(noise_of(strangers)[0], noise[0])


def test_noise_of_a_longer_response_begins_alike():
    np.testing.assert_array_equal(noise_of([5, 6, 7, 8], 5)[:, :3], noise_of([5, 6, 7, 8], 3))


def test_noise_differs_by_key_sample_and_token_and_is_in_range():
    noise = np.stack([noise_of(np.arange(4), seed=seed) for seed in range(2)])
    assert np.unique(noise).size == noise.size == 2 * 4 * 3 * 2
    assert noise.min() >= 0
    assert noise.max() < 1


@pytest.mark.parametrize("vocabulary", [7, 256, 257, 600])
@pytest.mark.parametrize("seed", range(3))
def test_frequencies_are_the_probabilities(vocabulary, seed):
    """Evenly spaced noise meets a token in proportion to its probability, but for the ends."""
    z, side = sparse_logits(seed, 1, vocabulary)[0], 64
    grid = (np.stack(np.meshgrid(*[np.arange(side)] * 2), axis=-1).reshape(-1, 2) + 0.5) / side
    z = jnp.asarray(z, jnp.float32)
    tokens, _ = draw(jnp.broadcast_to(z, (side**2, vocabulary)), jnp.asarray(grid, jnp.float32))
    frequencies = np.bincount(tokens, minlength=vocabulary) / side**2
    mass = np.asarray(jax.nn.softmax(z))
    blocks = np.arange(vocabulary) // 256
    shares = np.bincount(blocks, mass)
    # A block is met to within one row of the grid, and a token to within one column of it.
    allowed = 1 / side + (shares[blocks] + 1 / side) / side
    assert (np.abs(frequencies - mass) <= allowed).all()
    np.testing.assert_allclose(np.bincount(blocks, frequencies), shares, atol=1 / side)
    assert not frequencies[mass == 0].any()


def test_random_noise_passes_a_chi_square_test():
    count, z = 4096, jnp.array([0.0, 1.0, -jnp.inf, 0.5, -1.0, 0.0, 2.0])
    noise = noise_of(np.arange(count), 1)[:, 0]
    tokens, _ = draw(jnp.broadcast_to(z, (count, 7)), jnp.asarray(noise))
    expected = count * np.asarray(jax.nn.softmax(z))
    seen = np.bincount(tokens, minlength=7)
    possible = expected > 0
    assert not seen[~possible].any()
    # 5 degrees of freedom: a fair draw exceeds 20.5 once in a thousand keys.
    assert ((seen - expected)[possible] ** 2 / expected[possible]).sum() < 20.5


@given(logits((4, 7)), st.lists(st.sampled_from((0.0, 0.5, LAST)), min_size=8, max_size=8))
def test_a_banned_token_is_never_drawn(z, noise):
    noise = jnp.asarray(np.reshape(noise, (4, 2)), jnp.float32)
    tokens, logprobs = draw(jnp.asarray(z, jnp.float32), noise)
    assert np.isfinite(z[np.arange(4), tokens]).all()
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("support", [3, 20, 200])
def test_rounding_of_a_long_running_sum_never_draws_a_banned_token(support):
    """The noise sits on every step of the running sum and just beside it."""
    vocabulary, random = 600 * 256, np.random.default_rng(support)
    z = np.full(vocabulary, -np.inf, np.float32)
    z[random.choice(vocabulary, support, replace=False)] = random.normal(size=support)
    blocks = np.exp(z - z.max()).reshape(-1, 256).sum(axis=-1)
    steps = np.unique(np.asarray(jnp.cumsum(jnp.asarray(blocks))))
    steps = steps / steps[-1]
    first = np.concatenate([steps, np.nextafter(steps, np.float32(0)), [0.0, LAST]])
    first = np.minimum(first, LAST).astype(np.float32)
    for second in (0.0, LAST):
        for some in np.array_split(first, -(-len(first) // 64)):
            noise = jnp.stack([jnp.asarray(some), jnp.full(len(some), second, jnp.float32)], axis=1)
            tokens, logprobs = draw(jnp.broadcast_to(z, (len(some), vocabulary)), noise)
            assert np.isfinite(z[tokens]).all()
            assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("vocabulary", [1, 256, 600])
@pytest.mark.parametrize("u", [0.0, LAST, 1.0])
def test_edges_of_the_noise_draw_the_first_and_the_last_token(vocabulary, u):
    """1 itself is what float64 noise may round to."""
    tokens, logprobs = draw(jnp.zeros((1, vocabulary)), jnp.full((1, 2), u))
    assert int(tokens[0]) == (0 if u == 0 else vocabulary - 1)
    np.testing.assert_allclose(logprobs, -np.log(vocabulary), rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [7, 600])
def test_logprob_of_the_draw_is_that_of_the_softmax(vocabulary):
    z = jnp.asarray(sparse_logits(0, 8, vocabulary), jnp.float32)
    tokens, logprobs = draw(z, jnp.asarray(noise_of(np.arange(8), 1)[:, 0]))
    np.testing.assert_allclose(logprobs, token_logprobs(z, tokens), *TOLERANCES["float32"])


def test_ties_at_a_threshold_are_all_kept():
    z = jnp.array([[1.0, 3.0, 1.0, 1.0, 0.0]])
    for restriction in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": float(np.exp(-2.0)) * 0.999}):
        kept = np.isfinite(restrict_logits(z, **restriction))
        np.testing.assert_array_equal(kept, [[True, True, True, True, False]])


@pytest.mark.parametrize("restriction", [{"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_neighbouring_floats_are_told_apart(restriction):
    z = np.concatenate([np.linspace(-9, 9, 64), [1e-3, -1e4, 1e4]]).astype(np.float32)
    rows = [z]
    for _ in range(2):
        rows.append(np.nextafter(rows[-1], np.float32(-np.inf)))
    kept = np.isfinite(restrict_logits(jnp.asarray(np.stack(rows, axis=1)), **restriction))
    np.testing.assert_array_equal(kept, np.tile([True, True, False], (len(z), 1)))


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 0.4}], ids=str)
def test_zeros_of_either_sign_are_a_tie(restriction):
    z = jnp.array([[-0.0, 0.0, -1.0]])
    np.testing.assert_array_equal(
        np.isfinite(restrict_logits(z, **restriction)), [[True, True, False]]
    )


@given(logits((4, 7)), st.sampled_from((0.0, 1e-6, 0.5)), st.sampled_from((1.0, 0.5, 0.0)))
def test_the_most_likely_token_is_always_kept(z, top_p, min_p):
    z = jnp.asarray(z, jnp.float32)
    restricted = restrict_logits(z, top_k=1, top_p=top_p, min_p=min_p)
    np.testing.assert_array_equal(restricted.max(axis=-1), z.max(axis=-1))


@pytest.mark.parametrize("off", [{}, {"top_k": 5000}, {"top_p": 1.0}, {"min_p": 0.0}], ids=str)
def test_a_restriction_that_restricts_nothing_changes_nothing(off):
    """Also where the running sum of a long softmax rounds to 1 before its end."""
    z = -jnp.arange(5000.0)[None] / 250
    np.testing.assert_array_equal(restrict_logits(z, **off), z)


@pytest.mark.parametrize("top_k", [0, -3])
def test_refuses_to_keep_no_token(top_k):
    with pytest.raises(ValueError, match=f"got {top_k}"):
        restrict_logits(jnp.zeros((1, 4)), top_k=top_k)


def test_ban_removes_exactly_the_given_ids():
    z = jnp.zeros((2, 5))
    banned = ban_tokens(z, (1, 4), jnp.array(True))
    np.testing.assert_array_equal(np.isfinite(banned), [[True, False, True, True, False]] * 2)
    np.testing.assert_array_equal(ban_tokens(z, (1, 4), jnp.array(False)), z)
    one_row = ban_tokens(z, (1, 4), jnp.array([False, True]))
    np.testing.assert_array_equal(one_row, jnp.stack([z[0], banned[1]]))
