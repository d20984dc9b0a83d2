"""Where ours are the formulas of TRL, verl and OpenRLHF; else see `test_published_differences`."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import published_formulas as theirs
import pytest
from hypothesis import assume, given

from ppo_kernel.advantages import gae
from ppo_kernel.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    fixed_mean,
    sequence_mean,
    token_mean,
)
from ppo_kernel.ops.kl import k1, k2, k3, with_gradient_of
from ppo_kernel.ops.masked import whiten
from ppo_kernel.rewards import adaptive_kl_coef, token_rewards
from ppo_kernel.testing import SHAPES, TOLERANCES, log_ratios, masks, reals

SHAPE = SHAPES[0]
ROWS, WIDTH = SHAPE
TIGHT = TOLERANCES["float64"]
# verl and OpenRLHF add 1e-8 to some of their counts.
COUNTS = {"rtol": 1e-7, "atol": 1e-7}

lengths = hnp.arrays(int, ROWS, elements=st.integers(1, WIDTH))
flags = hnp.arrays(bool, ROWS)
filled = masks(SHAPE).filter(np.any)
rates = st.sampled_from((0.5, 0.9, 1.0))

estimate = jax.jit(gae)
whitened = jax.jit(whiten)


def prefix(lengths):
    return np.arange(WIDTH) < lengths[:, None]


def ours(function, *arrays, **settings):
    return function(*map(jnp.asarray, arrays), **settings)


def assert_equal_where(mask, got, want, tolerance=TIGHT):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a)[mask], b[mask], *tolerance)


@given(reals(SHAPE), reals(SHAPE), masks(SHAPE), rates, rates)
def test_gae_is_that_of_verl_for_any_mask(float64, rewards, values, mask, gamma, lam):
    got = ours(estimate, rewards, values, mask, np.zeros(ROWS), gamma=gamma, lam=lam)
    assert_equal_where(mask, got, theirs.gae_verl(rewards, values, mask, gamma, lam))


@given(reals(SHAPE), reals(SHAPE), lengths, rates, rates)
def test_gae_is_that_of_openrlhf_without_holes(float64, rewards, values, lengths, gamma, lam):
    mask = prefix(lengths)
    got = ours(estimate, rewards, values, mask, np.zeros(ROWS), gamma=gamma, lam=lam)
    want = theirs.gae_openrlhf(rewards, values, mask, gamma, lam)
    assert_equal_where(mask, got, want)


@given(reals(SHAPE[:1]), reals(SHAPE), reals(SHAPE), lengths, flags, st.booleans(), rates)
def test_rewards_and_gae_are_those_of_trl(
    float64, scores, x, values, lengths, terminated, to_the_end, gamma
):
    """Either all responses fill their room, or nothing is discounted: see the differences."""
    if to_the_end:
        lengths = np.full(ROWS, WIDTH)
    gamma, lam = (gamma, 0.95) if to_the_end else (1.0, 1.0)
    mask, settings = prefix(lengths), {"kl_coef": 0.05, "missing_eos_penalty": 1.5}
    rewards = ours(token_rewards, scores, x, mask, terminated, kl_estimator=k1, **settings)
    got = ours(estimate, rewards, values, mask, np.zeros(ROWS), gamma=gamma, lam=lam)
    want_rewards = theirs.rewards_trl(scores, x, lengths, terminated, *settings.values())
    want = theirs.gae_trl(want_rewards, values, lengths, gamma, lam)
    assert_equal_where(mask, got, want)
    np.testing.assert_allclose(rewards.sum(1), want_rewards.sum(1), *TIGHT)


@given(reals(SHAPE), reals(SHAPE), masks(SHAPE), flags)
def test_rewards_a_token_are_those_of_verl(float64, scores, x, mask, terminated):
    got = ours(token_rewards, scores * mask, x, mask, terminated, kl_coef=0.05, kl_estimator=k1)
    np.testing.assert_allclose(got, theirs.rewards_verl(scores * mask, x, mask, 0.05), *TIGHT)


@given(reals(SHAPE[:1]), reals(SHAPE), masks(SHAPE), flags, st.sampled_from((0.0, 0.05)))
def test_rewards_are_those_of_openrlhf(float64, scores, x, mask, terminated, kl_coef):
    settings = {"kl_coef": kl_coef, "kl_estimator": k1, "score_clip": 2.0}
    got = ours(token_rewards, scores, x, mask, terminated, **settings)
    want = theirs.rewards_openrlhf(scores, x, mask, kl_coef, 2.0)
    # They leave it to what comes after to drop the padding.
    assert_equal_where(mask, [got], [want])


@given(reals(SHAPE), filled)
def test_whitening_is_that_of_trl_and_verl_but_for_the_divisor(float64, x, mask):
    """y sqrt((n - 1) / n) is theirs, exactly, once the epsilons are made to match."""
    n = mask.sum()
    assume(n > 1)
    got = ours(whitened, x, mask, epsilon=1e-8 * (n - 1) / n)
    want = theirs.whiten_unbiased(x, mask)
    assert_equal_where(mask, [got * np.sqrt((n - 1) / n)], [want])


@given(reals(SHAPE), filled)
def test_whitening_is_that_of_openrlhf_above_its_floor(float64, x, mask):
    assume(x[mask].var() > 1e-8)
    assert_equal_where(
        mask, [ours(whitened, x, mask, epsilon=0.0)], [theirs.whiten_floored(x, mask)]
    )


@given(reals(SHAPE, 16))
def test_k1_and_k3_are_those_of_trl(float64, x):
    np.testing.assert_allclose(ours(k1, x), x, *TIGHT)
    np.testing.assert_allclose(ours(k3, x), theirs.k3_unbounded(x), *TIGHT)


@pytest.mark.parametrize(
    ("estimator", "peers", "bound"),
    [
        (k3, theirs.k3_verl, 2),
        (k1, theirs.k1_openrlhf, 10),
        (k2, theirs.k2_openrlhf, 4),
        (k3, theirs.k3_openrlhf, 2),
    ],
)
@given(data=st.data())
def test_kl_estimates_are_those_of_verl_and_openrlhf_up_to_10(
    float64, data, estimator, peers, bound
):
    x = data.draw(reals(SHAPE, bound))
    assert (peers(x) <= 10).all()
    np.testing.assert_allclose(ours(estimator, x), peers(x), *TIGHT)


@given(reals(SHAPE, 2))
def test_straight_through_is_that_of_verl(float64, x):
    """verl's `kl_penalty` "k3+": the value of k3 and the slope of k2, which is x itself."""
    value, slope = jax.vmap(jax.value_and_grad(with_gradient_of(k3, k2)))(jnp.asarray(x.ravel()))
    np.testing.assert_allclose(value, theirs.k3_verl(x.ravel()), *TIGHT)
    np.testing.assert_allclose(slope, x.ravel(), *TIGHT)


@given(st.floats(0, 1), st.floats(-10, 100))
def test_adaptive_coefficient_is_that_of_verl_and_openrlhf(float64, coef, kl):
    settings = {"target": 6.0, "horizon": 300.0}
    got = ours(adaptive_kl_coef, coef, kl, num_sequences=64, **settings)
    np.testing.assert_allclose(got, theirs.next_kl_coef(coef, kl, *settings.values(), 64), *TIGHT)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@given(log_ratios(SHAPE), reals(SHAPE), filled)
def test_policy_loss_is_that_of_verl_and_openrlhf(float64, dual_clip, x, advantages, mask):
    """Log-ratios beyond the clamp too: all three clamp at 20. verl's dual clip is always on."""
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    loss = ours(clipped_policy_loss, x, 0 * x, advantages, dual_clip=dual_clip, **clip)
    want = theirs.policy_loss(x, advantages, *clip.values(), dual_clip=dual_clip)
    np.testing.assert_allclose(
        jnp.sum(token_mean(jnp.asarray(mask)) * loss), theirs.mean_of_tokens(want, mask), *TIGHT
    )


@given(reals(SHAPE, 16), reals(SHAPE), filled)
def test_policy_loss_is_that_of_trl_within_the_clamp(float64, x, advantages, mask):
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    loss = ours(clipped_policy_loss, x, 0 * x, advantages, **clip)
    want = theirs.policy_loss(x, advantages, *clip.values(), limit=np.inf)
    np.testing.assert_allclose(
        jnp.sum(token_mean(jnp.asarray(mask)) * loss), theirs.mean_of_tokens(want, mask), *TIGHT
    )


@given(reals(SHAPE), reals(SHAPE), reals(SHAPE), filled)
def test_value_loss_is_that_of_all_three(float64, values, old_values, returns, mask):
    loss = ours(clipped_value_loss, values, old_values, returns, value_clip=0.2)
    want = theirs.mean_of_tokens(theirs.value_loss(values, old_values, returns, 0.2), mask)
    np.testing.assert_allclose(jnp.sum(token_mean(jnp.asarray(mask)) * loss), want, *TIGHT)


@given(reals(SHAPE), filled)
def test_token_and_sequence_means_are_those_of_verl_and_openrlhf(float64, loss, mask):
    for reduction, mean in (
        (token_mean, theirs.mean_of_tokens),
        (sequence_mean, theirs.mean_of_sequences),
    ):
        got = np.sum(np.asarray(ours(reduction, mask)) * loss)
        np.testing.assert_allclose(got, mean(loss, mask), **COUNTS)


@pytest.mark.parametrize("divisor", [1, WIDTH])
@given(reals(SHAPE), lengths)
def test_fixed_mean_is_the_norm_of_verl_where_no_row_is_empty(float64, divisor, loss, lengths):
    mask = prefix(lengths)
    got = np.sum(np.asarray(ours(fixed_mean(divisor), mask)) * loss)
    np.testing.assert_allclose(got, theirs.mean_of_sums(loss, mask, divisor), *TIGHT)
