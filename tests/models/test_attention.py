"""Attention's own backward pass, and what a layer may keep for it."""

import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from ppo_kernel.models.attention import attend, attend_causally

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


@pytest.mark.parametrize("slots", [1, 48, 97, 203, 1025])
def test_blocks_of_queries_equal_attention_over_the_whole_square(float64, slots):
    rng = np.random.default_rng(slots)
    query = jnp.asarray(rng.standard_normal((ROWS, KV_HEADS, GROUP, slots, HEAD)))
    key, value = (jnp.asarray(rng.standard_normal((ROWS, KV_HEADS, slots, HEAD))) for _ in range(2))
    # The first slot is valid, so that every query sees one: their own values else differ.
    mask = jnp.asarray(rng.random((ROWS, slots)) < 0.7).at[:, 0].set(True)
    causal = jnp.tril(jnp.ones((slots, slots), bool))[None] & mask[:, None]
    cotangent = jnp.asarray(rng.standard_normal(query.shape))
    for got, want in zip(
        with_gradients(attend_causally, (query, key, value), mask, cotangent),
        with_gradients(formula, (query, key, value), causal, cotangent),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("slots", "blocks"), [(95, 1), (256, 4), (1016, 7), (4096, 8)])
def test_the_part_that_no_query_sees_is_not_computed(slots, blocks):
    """Of four blocks (1 + 2 + 3 + 4) / 16 of the logits of the square, of eight 9 / 16."""
    shapes = (2, 2, 1, slots, HEAD), (2, 2, slots, HEAD), (2, 2, slots, HEAD)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(attend_causally).lower(*arrays, jnp.ones((2, slots), bool)).as_text()
    found = re.findall(r"dot_general.*-> tensor<2x2x(\d+)x(\d+)xf32>", text)
    products = [(int(keys), int(queries)) for keys, queries in found]
    bounds = [slots * n // blocks for n in range(blocks + 1)]
    want = [(end, end - start) for start, end in pairwise(bounds)]
    assert [product for product in products if HEAD not in product] == want


@pytest.mark.parametrize(
    "settings",
    [{"remat": None}, {"remat": jax.checkpoint_policies.nothing_saveable}, {"unroll": 2}],
    ids=["everything kept", "nothing kept", "unrolled"],
)
def test_how_the_layers_are_compiled_does_not_change_the_gradient(float64, settings):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 13, (2, 5)), jnp.int32)
    mask = jnp.asarray(rng.random((2, 5)) < 0.8)

    def gradient(**settings):
        policy = oracle.draw_policy(oracle.trunk_config(**settings), np.random.default_rng(1))

        def total(policy):
            hidden = jnp.sin(policy.hidden(tokens, mask))
            return jnp.sum(jnp.where(mask[..., None], hidden, 0.0))

        return jax.tree.leaves(jax.grad(total)(policy))

    for got, want in zip(gradient(**settings), gradient(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_the_mixed_values_are_kept_and_the_weights_are_not(float64):
    """Two products forward; backward q k^T once more, and one for each of dv, dp, dq and dk."""
    policy = oracle.draw_policy(oracle.trunk_config(), np.random.default_rng(0))
    tokens = jnp.zeros((2, 5), jnp.int32)
    gradient = jax.grad(lambda policy: jnp.sum(policy.hidden(tokens, tokens == 0)))
    assert jax.jit(gradient).lower(policy).as_text().count("batching_dims") == 2 + 1 + 4
