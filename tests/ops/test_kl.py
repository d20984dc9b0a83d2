"""What each KL estimator claims, by exact enumeration of a small vocabulary in float64."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ppo_kernel.ops.kl import clamp_log_ratio, is_clamped, k1, k2, k3, with_gradient_of
from ppo_kernel.ops.logprobs import token_logprobs
from ppo_kernel.testing import SHAPES, TOLERANCES, log_ratios, reals

VOCABULARY = 5
TIGHT = TOLERANCES["float64"]
policies = st.tuples(reals((VOCABULARY,), 2), reals((VOCABULARY,), 2))


def all_logprobs(logits):
    return token_logprobs(jnp.broadcast_to(logits, (VOCABULARY,) * 2), jnp.arange(VOCABULARY))


def divergence(logits, other):
    """KL(logits || other), summed over the vocabulary."""
    logp, logq = all_logprobs(logits), all_logprobs(other)
    return jnp.sum(jnp.exp(logp) * (logp - logq))


def expectation(estimator, logits, other):
    """Mean of the estimate over tokens of the present policy, whose sampling has no gradient."""
    logp = all_logprobs(logits)
    mass = jax.lax.stop_gradient(jnp.exp(logp))
    return jnp.sum(mass * estimator(logp - all_logprobs(other)))


@pytest.mark.parametrize("estimator", [k1, k3], ids=lambda f: f.__name__)
@given(pair=policies)
def test_k1_and_k3_are_unbiased(float64, estimator, pair):
    policy, other = map(jnp.asarray, pair)
    np.testing.assert_allclose(
        expectation(estimator, policy, other), divergence(policy, other), *TIGHT
    )


GRADIENTS = {
    k1: lambda policy, other: jnp.zeros_like(policy),
    k2: jax.grad(divergence),
    k3: lambda policy, other: jax.grad(divergence, argnums=1)(other, policy),
    with_gradient_of(k3, k2): jax.grad(divergence),
}


@pytest.mark.parametrize("estimator", GRADIENTS, ids=["k1", "k2", "k3", "k3_with_gradient_of_k2"])
@given(pair=policies)
def test_expected_gradient(float64, estimator, pair):
    policy, other = map(jnp.asarray, pair)
    slope = jax.grad(expectation, argnums=1)(estimator, policy, other)
    np.testing.assert_allclose(slope, GRADIENTS[estimator](policy, other), *TIGHT)


@given(log_ratios(SHAPES[0]))
def test_k2_and_k3_are_never_negative_and_always_finite(x):
    for estimator in (k2, k3):
        estimate = np.asarray(estimator(jnp.asarray(x, jnp.float32)))
        assert (estimate >= 0).all()
        assert np.isfinite(estimate).all()


@pytest.mark.parametrize("value", [k1, k2, k3], ids=lambda f: f.__name__)
@pytest.mark.parametrize("gradient", [k1, k2, k3], ids=lambda f: f.__name__)
@given(x=log_ratios((6,)))
def test_with_gradient_of_takes_each_exactly(value, gradient, x):
    x = jnp.asarray(x, jnp.float32)
    both = with_gradient_of(value, gradient)
    np.testing.assert_array_equal(both(x), value(x))
    slopes = [jax.vmap(jax.grad(estimator))(x) for estimator in (both, gradient)]
    np.testing.assert_array_equal(*slopes)


def test_clamp_acts_beyond_20_and_has_no_gradient_there():
    x = jnp.array([-np.inf, -25.0, -20.0, 0.0, 20.0, 25.0, np.inf])
    np.testing.assert_array_equal(clamp_log_ratio(x), [-20, -20, -20, 0, 20, 20, 20])
    np.testing.assert_array_equal(is_clamped(x), [True, True, False, False, False, True, True])
    np.testing.assert_array_equal(jax.vmap(jax.grad(k3))(x)[jnp.array([0, 1, 5, 6])], 0)


def test_k3_keeps_the_digits_of_a_small_log_ratio():
    x = np.array([1e-3, -1e-4])
    np.testing.assert_allclose(k3(jnp.asarray(x, jnp.float32)), x**2 / 2, rtol=1e-2)
