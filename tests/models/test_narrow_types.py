"""bfloat16 models: products are summed in float32, and what a softmax reads is not rounded."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ppo_kernel.models.kernels.cached_attention import attend_to_cache
from ppo_kernel.models.kernels.softmax_attention import attend

TYPES = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "cache_dtype": "bfloat16"}


def drawn(*shape, seed=0, size=1.0):
    return jnp.asarray(size * np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def wide(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("rows", [3, 80])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_not_rounded_to_the_compute_type(rows, packed):
    policy = tiny.language_model(**TYPES)
    matrix = policy.output
    hidden = drawn(rows, matrix.shape[1], size=20.0)
    unembed = policy.decoder().unembed if packed else policy.unembed
    logits = jax.jit(lambda hidden: unembed(hidden))(hidden)
    want = wide(hidden) @ wide(matrix).T
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-4)
    assert np.abs(want - wide(want.astype(jnp.bfloat16))).max() > 0.02


def test_the_gradient_through_logits_keeps_the_types_of_the_model():
    policy = tiny.language_model(**TYPES)
    hidden, slopes = drawn(5, policy.output.shape[1]), drawn(5, policy.output.shape[0], seed=1)

    def value(hidden, output):
        return jnp.sum(slopes.astype(jnp.float32) * replace(policy, output=output).unembed(hidden))

    by_hidden, by_output = jax.jit(jax.grad(value, (0, 1)))(hidden, policy.output)
    assert by_hidden.dtype == by_output.dtype == jnp.bfloat16
    for got, want in (
        (by_hidden, wide(slopes) @ wide(policy.output)),
        (by_output, wide(slopes).T @ wide(hidden)),
    ):
        np.testing.assert_allclose(wide(got), want, rtol=2**-7, atol=1e-3)


def test_attention_weights_come_from_logits_that_are_not_rounded():
    """In bfloat16 they would be off by up to 0.25: a quarter of a weight."""
    query, keys, values = (drawn(2, 3, n, 8, seed=n) for n in (1, 16, 17))
    values = values[:, :, :16]
    # Half of each key is the same everywhere, and adds some 50 to every logit.
    query, keys = query.at[..., :4].set(1.0), keys.at[..., :4].set(36.0)
    logits = np.einsum("bkqe,bkse->bkqs", wide(query), wide(keys)) / 8**0.5
    assert logits.min() > 40
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    want = weights / weights.sum(axis=-1, keepdims=True) @ wide(values)
    whole = attend(query[:, :, None], keys, values, jnp.ones((2, 1, 16), bool))
    cached = attend_to_cache(query, keys.swapaxes(2, 3), values, jnp.ones((2, 16), bool))
    for got in (whole[:, :, 0], cached):
        np.testing.assert_allclose(wide(got), want, atol=0.01)
