"""Layers with a gradient of their own, against NumPy and against what autodiff makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ppo_kernel.models.layers import Linear, gated, product, rotate, rotation_of, side_by_side


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (3, 5), (4, 4), (520, 515), (600, 512)])
def test_a_product_and_its_gradients_equal_numpy(float64, inputs, outputs):
    """On both sides of each bound that chooses the weight gradient's orientation."""
    x, weight, along = drawn(7, inputs), drawn(inputs, outputs, seed=1), drawn(7, outputs, seed=2)
    value, back = jax.vjp(jax.jit(product), x, weight)
    x_gradient, weight_gradient = jax.jit(back)(along)
    x, weight, along = (np.asarray(a) for a in (x, weight, along))
    np.testing.assert_allclose(value, x @ weight, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x_gradient, along @ weight.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weight_gradient, x.T @ along, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("function", "shape"), [(product, (5, 3)), (gated, (4, 5))])
def test_gradients_and_their_gradients_equal_finite_differences(float64, function, shape):
    arguments = drawn(4, 5), drawn(*shape, seed=1)
    check_grads(lambda *xs: function(*map(jnp.asarray, xs)), arguments, order=2, modes=["rev"])


def test_the_gated_product_equals_its_formula_far_from_zero(float64):
    gate = jnp.array([-800.0, -40.0, -1.0, 0.0, 1.0, 40.0, 800.0])
    up, along = drawn(7), drawn(7, seed=1)
    value, back = jax.vjp(gated, gate, up)
    plain, plain_back = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    np.testing.assert_allclose(value, plain, rtol=1e-12)
    for got, want in zip(back(along), plain_back(along), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("with_bias", [(), (4, 2, 3), (4, 3)])
def test_layers_side_by_side_equal_each_alone(float64, with_bias):
    layers = tuple(
        Linear(drawn(6, size, seed=size), drawn(size, seed=1) if size in with_bias else None)
        for size in (4, 2, 3)
    )
    x = drawn(5, 2, 6)
    for got, layer in zip(side_by_side(x, layers), layers, strict=True):
        np.testing.assert_allclose(got, layer(x), rtol=1e-12, atol=1e-12)


def test_a_rotation_turns_each_pair_by_its_angle(float64):
    x, frequencies = drawn(2, 3, 4, 6), jnp.array([1.0, 0.3, 0.01])
    positions = jnp.array([[0, 1, 2], [0, 7, 1000]])
    got = rotate(x, rotation_of(positions, frequencies))
    pairs = np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])
    angles = np.asarray(positions)[..., None, None] * np.asarray(frequencies)
    turned = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-12)
