"""The same numbers from libraries that other people wrote."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from ppo_kernel.advantages import gae
from ppo_kernel.losses import clipped_policy_loss
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
