"""The same numbers from libraries that other people wrote."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from ppo_kernel.advantages import gae
from ppo_kernel.losses import clipped_policy_loss, clipped_value_loss
from ppo_kernel.ops.kl import k1, k3
from ppo_kernel.ops.logprobs import entropy, token_logprobs
from ppo_kernel.testing import SHAPES, TOLERANCES, reals, token_ids

SHAPE, VOCABULARY = SHAPES[0], 7
TIGHT = TOLERANCES["float64"]


@pytest.fixture
def rlax():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns on import
        return pytest.importorskip("rlax")


@given(reals(SHAPE), reals(SHAPE), reals(SHAPE[:1]))
def test_gae_is_that_of_rlax(float64, rlax, rewards, values, bootstrap):
    rewards, values, bootstrap = map(jnp.asarray, (rewards, values, bootstrap))
    discounts = jnp.full(SHAPE[1], 0.9)
    with_last = jnp.concatenate([values, bootstrap[:, None]], axis=1)
    theirs = jax.vmap(rlax.truncated_generalized_advantage_estimation, (0, None, None, 0))
    expected = jax.jit(theirs)(rewards, discounts, 0.95, with_last)
    got, _ = jax.jit(gae)(rewards, values, jnp.ones(SHAPE, bool), bootstrap, gamma=0.9, lam=0.95)
    np.testing.assert_allclose(got, expected, *TIGHT)


@given(reals(SHAPE, 2), reals(SHAPE))
def test_clipped_surrogate_is_that_of_rlax(float64, rlax, log_ratio, advantages):
    def judged(x):
        loss = clipped_policy_loss(
            x, jnp.zeros(SHAPE), jnp.asarray(advantages), clip_ratio_low=0.2, clip_ratio_high=0.2
        )
        return jnp.mean(loss)

    def expected(x):
        ratios, adv = jnp.exp(x).reshape(-1), jnp.asarray(advantages).reshape(-1)
        return rlax.clipped_surrogate_pg_loss(ratios, adv, 0.2)

    x = jnp.asarray(log_ratio)
    for got, want in zip(*(jax.value_and_grad(f)(x) for f in (judged, expected)), strict=True):
        np.testing.assert_allclose(got, want, *TIGHT)


@given(reals((*SHAPE, VOCABULARY)), token_ids(SHAPE, VOCABULARY))
def test_logprobs_and_entropies_are_those_of_optax_and_scipy(float64, logits, tokens):
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    np.testing.assert_allclose(token_logprobs(logits, tokens), -cross_entropy, *TIGHT)
    expected = jax.scipy.special.entr(jax.nn.softmax(logits)).sum(axis=-1)
    np.testing.assert_allclose(entropy(logits), expected, *TIGHT)


@given(reals((2, *SHAPE, VOCABULARY), 4))
def test_expected_k1_and_k3_are_the_divergence_of_rlax_and_optax(float64, rlax, logits):
    """The expectation over the whole vocabulary, of which a rollout draws one token."""
    policy, reference = jax.nn.log_softmax(jnp.asarray(logits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        of_rlax = rlax.categorical_kl_divergence(*jnp.asarray(logits))
    of_optax = optax.losses.kl_divergence(reference, jnp.exp(policy))
    for estimator in (k1, k3):
        got = jnp.sum(jnp.exp(policy) * estimator(policy - reference), axis=-1)
        np.testing.assert_allclose(got, of_rlax, *TIGHT)
        np.testing.assert_allclose(got, of_optax, *TIGHT)


@given(reals(SHAPE), reals(SHAPE), reals(SHAPE))
def test_value_loss_is_that_of_optax(float64, values, old_values, returns):
    """Without a clip `l2_loss`; with one the worse of two, one of them of a projected value."""
    values, old_values, returns = map(jnp.asarray, (values, old_values, returns))
    plain = optax.losses.l2_loss(values, returns)
    np.testing.assert_allclose(clipped_value_loss(values, old_values, returns), plain, *TIGHT)
    near = optax.projections.projection_box(values, old_values - 0.2, old_values + 0.2)
    worse = jnp.maximum(plain, optax.losses.l2_loss(near, returns))
    got = clipped_value_loss(values, old_values, returns, value_clip=0.2)
    np.testing.assert_allclose(got, worse, *TIGHT)
