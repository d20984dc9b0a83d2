"""The product with its own gradient, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ppo_kernel.models.kernels.matmul import matmul


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (3, 5), (4, 4), (520, 515), (600, 512)])
def test_a_product_and_its_gradients_equal_numpy(float64, inputs, outputs):
    """On both sides of each bound that chooses the weight gradient's orientation."""
    x, weight, along = drawn(7, inputs), drawn(inputs, outputs, seed=1), drawn(7, outputs, seed=2)
    value, back = jax.vjp(jax.jit(matmul), x, weight)
    x_gradient, weight_gradient = jax.jit(back)(along)
    x, weight, along = (np.asarray(a) for a in (x, weight, along))
    np.testing.assert_allclose(value, x @ weight, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x_gradient, along @ weight.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weight_gradient, x.T @ along, rtol=1e-12, atol=1e-12)


def test_gradients_and_their_gradients_equal_finite_differences(float64):
    arguments = drawn(4, 5), drawn(5, 3, seed=1)
    check_grads(lambda *xs: matmul(*map(jnp.asarray, xs)), arguments, order=2, modes=["rev"])
