"""Attention in blocks of queries: what no query sees is not computed, and nothing else changes."""

import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_kernel.models.kernels.causal_attention import attend_causally, plain_attend_causally

ROWS, KV_HEADS, GROUP, HEAD = 2, 3, 2, 6


def with_gradients(function, arrays, mask, cotangent):
    output, backward = jax.vjp(lambda *x: function(*x, mask), *arrays)
    return output, *backward(cotangent)


@pytest.mark.parametrize("slots", [1, 48, 97, 203, 1025])
def test_blocks_of_queries_equal_attention_over_the_whole_square(float64, slots):
    rng = np.random.default_rng(slots)
    query = jnp.asarray(rng.standard_normal((ROWS, KV_HEADS, GROUP, slots, HEAD)))
    key, value = (jnp.asarray(rng.standard_normal((ROWS, KV_HEADS, slots, HEAD))) for _ in range(2))
    # The first slot is valid, so that every query sees one: their own values else differ.
    mask = jnp.asarray(rng.random((ROWS, slots)) < 0.7).at[:, 0].set(True)
    cotangent = jnp.asarray(rng.standard_normal(query.shape))
    for got, want in zip(
        with_gradients(attend_causally, (query, key, value), mask, cotangent),
        with_gradients(plain_attend_causally, (query, key, value), mask, cotangent),
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
