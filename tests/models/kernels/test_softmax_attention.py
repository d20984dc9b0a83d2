"""Attention's own backward pass against autodiff of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_kernel.models.kernels.softmax_attention import attend

ROWS, KV_HEADS, GROUP, QUERIES, SLOTS, HEAD = 2, 3, 2, 4, 5, 6


def formula(query, key, value, allowed):
    """The softmax written out, for autodiff."""
    logits = jnp.einsum("bkgqe,bkse->bkgqs", query, key) / HEAD**0.5
    logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(logits.dtype).min)
    return jnp.einsum("bkgqs,bkse->bkgqe", jax.nn.softmax(logits), value)


def draw(dtype, size=1.0):
    """Arguments where some slots are not allowed and one query sees nothing; a cotangent."""
    rng = np.random.default_rng(0)
    query = size * rng.standard_normal((ROWS, KV_HEADS, GROUP, QUERIES, HEAD))
    key, value = (rng.standard_normal((ROWS, KV_HEADS, SLOTS, HEAD)) for _ in range(2))
    allowed = rng.random((ROWS, QUERIES, SLOTS)) < 0.6
    allowed[1, 2] = False
    arrays = [jnp.asarray(x, dtype) for x in (query, key, value, rng.standard_normal(query.shape))]
    return arrays[:3], jnp.asarray(allowed), arrays[3]


def with_gradients(function, arrays, allowed, cotangent):
    output, backward = jax.vjp(lambda *x: function(*x, allowed), *arrays)
    return output, *backward(cotangent)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_attention_and_its_gradients_equal_autodiff_of_the_formula(float64, size):
    arguments = draw(jnp.float64, size)
    for got, want in zip(
        with_gradients(attend, *arguments), with_gradients(formula, *arguments), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * size)


def test_attention_in_bfloat16_keeps_its_type_and_computes_the_softmax_wide():
    arguments = draw(jnp.bfloat16)
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments
    )
    for got, want in zip(
        with_gradients(attend, *arguments), with_gradients(formula, *wide), strict=True
    ):
        assert got.dtype == jnp.bfloat16
        # A product of bfloat16 numbers is summed in float32: roundings of 2^-9 of each factor.
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 2**-6, f"relative error {error}"


def test_a_derivative_of_the_gradient_exists(float64):
    """Forward over reverse, as for the products of a Hessian and a vector."""
    (query, key, value), allowed, along = draw(jnp.float64)

    def derivative(function):
        gradient = jax.grad(lambda q: jnp.sum(jnp.sin(function(q, key, value, allowed))))
        return jax.jvp(gradient, (query,), (along,))[1]

    np.testing.assert_allclose(derivative(attend), derivative(formula), rtol=1e-9, atol=1e-12)
