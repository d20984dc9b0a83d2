"""The gated activation, where its derivative is hard, and its second derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ppo_kernel.models.kernels.glu import glu, plain_glu


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu])
def test_gradients_and_their_gradients_equal_finite_differences(float64, activation):
    arguments = drawn(4, 5), drawn(4, 5, seed=1)
    check_grads(
        lambda *xs: glu(activation, *map(jnp.asarray, xs)), arguments, order=2, modes=["rev"]
    )


def test_swiglu_equals_its_formula_far_from_zero(float64):
    gate = jnp.array([-800.0, -40.0, -1.0, 0.0, 1.0, 40.0, 800.0])
    up, along = drawn(7), drawn(7, seed=1)
    value, back = jax.vjp(lambda *xs: glu(jax.nn.silu, *xs), gate, up)
    plain, plain_back = jax.vjp(lambda *xs: plain_glu(jax.nn.silu, *xs), gate, up)
    np.testing.assert_allclose(value, plain, rtol=1e-12)
    for got, want in zip(back(along), plain_back(along), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
