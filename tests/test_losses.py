"""Laws of the per-token losses beyond their twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ppo_kernel.losses import clipped_policy_loss, clipped_value_loss, is_clipped
from ppo_kernel.testing import SHAPES, log_ratios, reals

SHAPE = SHAPES[0]
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


def slopes(loss, *arrays, **settings):
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    return np.asarray(jax.grad(lambda first: loss(first, *arrays[1:], **settings).sum())(arrays[0]))


@given(reals(SHAPE, 4), reals(SHAPE))
def test_at_unchanged_parameters_it_is_the_policy_gradient(logprobs, advantages):
    arrays = [jnp.asarray(x, jnp.float32) for x in (logprobs, logprobs, advantages)]
    np.testing.assert_array_equal(clipped_policy_loss(*arrays, **CLIP), -arrays[2])
    slope = slopes(clipped_policy_loss, logprobs, logprobs, advantages, **CLIP)
    np.testing.assert_array_equal(slope, -advantages)
    assert not is_clipped(*arrays, **CLIP).any()


@given(reals(SHAPE, 3), reals(SHAPE))
def test_is_clipped_says_where_the_gradient_is_gone(log_ratio, advantages):
    old = np.zeros(SHAPE)
    slope = slopes(clipped_policy_loss, log_ratio, old, advantages, **CLIP)
    arrays = [jnp.asarray(x, jnp.float32) for x in (log_ratio, old, advantages)]
    clipped = np.asarray(is_clipped(*arrays, **CLIP))
    np.testing.assert_array_equal(clipped, (slope == 0) & (advantages != 0))
    np.testing.assert_allclose(slope, np.where(clipped, 0, -advantages * np.exp(log_ratio)), 1e-5)


def test_a_ratio_at_its_bound_is_not_clipped_yet():
    arrays = jnp.zeros(2), jnp.zeros(2), jnp.array([-1.0, 1.0])
    assert not is_clipped(*arrays, clip_ratio_low=0.0, clip_ratio_high=0.0).any()


@given(log_ratios(SHAPE), reals(SHAPE))
def test_an_overflowing_ratio_is_clamped(log_ratio, advantages):
    old = np.zeros(SHAPE)
    arrays = [jnp.asarray(x, jnp.float32) for x in (log_ratio, old, advantages)]
    assert np.isfinite(clipped_policy_loss(*arrays, **CLIP)).all()
    slope = slopes(clipped_policy_loss, log_ratio, old, advantages, **CLIP)
    assert np.isfinite(slope).all()
    assert not slope[np.abs(log_ratio) > 20].any()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (5.0, -2.0, 2.0 * 3.0, 0.0),  # the bound holds a bad token that became likely
        (5.0, 2.0, -2.0 * 1.28, 0.0),  # a good one is left to the ordinary clip
        (1.0, -2.0, 2.0 * np.e, 2.0 * np.e),  # below the bound nothing changes
    ],
)
def test_dual_clip_bounds_the_loss_of_negative_advantages_only(log_ratio, advantage, loss, slope):
    arrays = [jnp.array([x]) for x in (log_ratio, 0.0, advantage)]
    got = clipped_policy_loss(*arrays, dual_clip=3.0, **CLIP)
    np.testing.assert_allclose(got, [loss], rtol=1e-6)
    np.testing.assert_allclose(
        slopes(clipped_policy_loss, *arrays, dual_clip=3.0, **CLIP), [slope], rtol=1e-6
    )


@given(reals(SHAPE), reals(SHAPE))
def test_value_gradient_is_the_error(values, returns):
    np.testing.assert_array_equal(
        slopes(clipped_value_loss, values, values, returns), values - returns
    )
    # Near the old value the clip is idle.
    near = slopes(clipped_value_loss, values, values + 0.125, returns, value_clip=0.2)
    np.testing.assert_allclose(near, values - returns, rtol=1e-5, atol=1e-5)


def test_a_value_that_ran_past_its_clip_towards_the_return_has_no_gradient():
    old, returns, settings = jnp.zeros(2), jnp.full(2, 5.0), {"value_clip": 1.0}
    values = jnp.array([2.0, -2.0])  # towards the return, and away from it
    np.testing.assert_array_equal(clipped_value_loss(values, old, returns, **settings), [8.0, 24.5])
    np.testing.assert_array_equal(
        slopes(clipped_value_loss, values, old, returns, **settings), [0.0, -7.0]
    )
