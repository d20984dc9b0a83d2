"""Laws of the masked reductions beyond their twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ppo_kernel.losses import fixed_mean, sequence_mean, token_mean
from ppo_kernel.ops.masked import masked_sum, whiten
from ppo_kernel.testing import SHAPES, masks, reals

SHAPE = SHAPES[0]


@given(reals(SHAPE), masks(SHAPE))
def test_whitened_values_have_mean_0_and_variance_1(x, mask):
    y = np.asarray(whiten(jnp.asarray(x, jnp.float32), jnp.asarray(mask)))[mask]
    if y.size and np.ptp(x[mask]) > 0:
        np.testing.assert_allclose([y.mean(), y.var()], [0, 1], atol=1e-4)
    else:
        np.testing.assert_array_equal(y, 0)


def test_whitening_is_over_the_batch_not_over_a_row():
    y = whiten(jnp.array([[0.0, 0.0], [4.0, 4.0]]), jnp.ones((2, 2), bool))
    np.testing.assert_allclose(y, [[-1, -1], [1, 1]], rtol=1e-6)


@pytest.mark.parametrize("reduction", [token_mean, sequence_mean], ids=lambda f: f.__name__)
@given(mask=masks(SHAPE))
def test_weights_of_a_mean_sum_to_1_and_stay_inside_the_mask(reduction, mask):
    weights = np.asarray(reduction(jnp.asarray(mask)))
    assert not weights[~mask].any()
    np.testing.assert_allclose(weights.sum(), float(mask.any()), rtol=1e-6)


def test_fixed_mean_of_full_rows_sums_to_1():
    weights = fixed_mean(SHAPE[1])(jnp.ones(SHAPE, bool))
    np.testing.assert_allclose(weights, 1 / np.prod(SHAPE), rtol=1e-6)


def test_token_and_sequence_mean_differ_where_lengths_do():
    mask = jnp.array([[True, True, True], [True, False, False]])
    np.testing.assert_allclose(token_mean(mask)[:, 0], [1 / 4, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(sequence_mean(mask)[:, 0], [1 / 6, 1 / 2], rtol=1e-6)


@pytest.mark.parametrize("slots", [0, -1])
def test_fixed_mean_refuses_no_slots(slots):
    with pytest.raises(ValueError, match=f"got {slots}"):
        fixed_mean(slots)


@given(reals(SHAPE), masks(SHAPE))
def test_gradient_ignores_poison_at_masked_places(x, mask):
    x = jnp.asarray(np.where(mask, x, np.nan), jnp.float32)
    slope = jax.grad(lambda x: masked_sum(whiten(x, jnp.asarray(mask)) ** 3, jnp.asarray(mask)))(x)
    assert np.isfinite(slope).all()
    assert not np.asarray(slope)[~mask].any()


def test_fixed_mean_of_one_slot_is_the_mean_over_sequences():
    np.testing.assert_array_equal(fixed_mean(1)(jnp.ones((4, 1), bool)), np.full((4, 1), 0.25))


def test_a_constant_is_whitened_to_zero_and_a_small_spread_stays_small():
    mask = jnp.ones((1, 2), bool)
    np.testing.assert_array_equal(whiten(jnp.full((1, 2), 0.5), mask), np.zeros((1, 2)))
    # The variance is 1e-8, as large as the epsilon that is added to it.
    spread = whiten(jnp.array([[-1e-4, 1e-4]]), mask)
    np.testing.assert_allclose(spread, [[-(0.5**0.5), 0.5**0.5]], rtol=1e-4)
