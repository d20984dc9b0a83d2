"""Linear maps of one input as one product."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppo_kernel.models.linear import Linear, fused


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("with_bias", [(), (4, 2, 3), (4, 3)])
def test_layers_in_one_product_equal_each_alone(float64, with_bias):
    layers = tuple(
        Linear(drawn(6, size, seed=size), drawn(size, seed=1) if size in with_bias else None)
        for size in (4, 2, 3)
    )
    x = drawn(5, 2, 6)
    for got, layer in zip(fused(*layers)(x), layers, strict=True):
        np.testing.assert_allclose(got, layer(x), rtol=1e-12, atol=1e-12)
