"""Where we differ from TRL, verl, OpenRLHF or Tunix on purpose, each in its smallest case.

`published_formulas.py` names their sources; `test_published_formulas.py` has where we agree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import published_formulas as theirs
import pytest

from ppo_kernel.advantages import gae
from ppo_kernel.losses import clipped_policy_loss, fixed_mean, token_mean
from ppo_kernel.ops.kl import k1, k2, k3
from ppo_kernel.ops.masked import whiten
from ppo_kernel.rewards import adaptive_kl_coef, token_rewards

FULL = np.ones((1, 3), bool)


def row(*numbers):
    return np.array([numbers], float)


def rewarded(scores, mask, **settings):
    settings = {"kl_coef": 0.0, "kl_estimator": None} | settings
    terminated = jnp.ones(len(mask), bool)
    mask = jnp.asarray(mask)
    return token_rewards(jnp.asarray(scores), jnp.zeros(mask.shape), mask, terminated, **settings)


def estimated(rewards, values, mask, bootstrap=0.0, **rates):
    arrays = map(jnp.asarray, (rewards, values, mask, [bootstrap]))
    return [np.asarray(x) for x in gae(*arrays, **rates)]


def test_the_score_of_a_finished_response_lands_on_its_eos(float64):
    """TRL puts it one slot later where there is a slot, so a finished response is discounted once
    more than one that filled its room, and the critic's value after the end leaks in. An episode
    ends with the EOS: nothing follows it, and the length of the buffer must not matter.
    """
    scores, lengths, values = np.array([1.0]), np.array([2]), row(0, 0, 5)
    mask, rates = np.arange(3) < lengths[:, None], {"gamma": 0.5, "lam": 0.0}
    rewards = rewarded(scores, mask)
    np.testing.assert_array_equal(rewards, row(0, 1, 0))
    np.testing.assert_array_equal(estimated(rewards, values, mask, **rates)[0], row(0, 1, 0))
    late = theirs.rewards_trl(scores, 0 * values, lengths, np.array([True]), 0.0, 0.0)
    np.testing.assert_array_equal(late, row(0, 0, 1))
    np.testing.assert_array_equal(
        theirs.gae_trl(late, values, lengths, *rates.values())[0], row(0, 2.5, -4)
    )
    # Without the spare slot TRL's score is where ours is.
    narrow = theirs.rewards_trl(scores, row(0, 0), lengths, np.array([True]), 0.0, 0.0)
    np.testing.assert_array_equal(narrow, row(0, 1))


def test_an_empty_response_has_no_reward():
    """OpenRLHF's index of the last token is the last slot there, which is padding: the score is in
    sums over the buffer. Nobody acted, so nobody is rewarded; we count such rows instead.
    """
    empty = np.zeros((1, 3), bool)
    np.testing.assert_array_equal(rewarded(np.array([1.0]), empty), row(0, 0, 0))
    np.testing.assert_array_equal(
        theirs.rewards_openrlhf(np.array([1.0]), row(0, 0, 0), empty, 0.0, 9.0), row(0, 0, 1)
    )


def test_a_fraction_of_a_score_is_kept():
    """Tunix adds it to a buffer with the integer type of the token ids, where 0.75 is 0."""
    scores, tokens = np.array([0.75]), np.zeros((1, 3), np.int32)
    np.testing.assert_array_equal(rewarded(scores, FULL), row(0, 0, 0.75))
    np.testing.assert_array_equal(theirs.rewards_tunix(scores, tokens, [2]), row(0, 0, 0))


def test_a_negative_coefficient_is_a_bonus():
    """OpenRLHF makes it 0 in silence. The configuration refuses it; the formula computes it."""
    x, terminated = row(1, 1, 1), jnp.ones(1, bool)
    settings = {"kl_coef": -0.5, "kl_estimator": k1}
    got = token_rewards(jnp.zeros(1), jnp.asarray(x), jnp.asarray(FULL), terminated, **settings)
    np.testing.assert_array_equal(got, row(0.5, 0.5, 0.5))
    np.testing.assert_array_equal(
        theirs.rewards_openrlhf(np.zeros(1), x, FULL, -0.5, 9.0), row(0, 0, 0)
    )


def test_gae_carries_through_a_hole_undiscounted(float64):
    """The loop of OpenRLHF (and TRL) counts a masked slot, such as a tool's answer, as a step whose
    value is 0: what follows it is discounted once more and the critic's view of it is lost. Tokens
    that the policy did not choose are no decisions, so ours, like verl's, steps over them.
    """
    mask, rates = np.array([[True, False, True]]), {"gamma": 0.5, "lam": 0.5}
    rewards, values = row(0, 0, 8), row(1, 7, 4)
    last = 8 - 4
    ours, _ = estimated(rewards, values, mask, **rates)
    np.testing.assert_array_equal(ours, row(0.5 * 4 - 1 + 0.25 * last, 0, last))
    verl, _ = theirs.gae_verl(rewards, values, mask, **rates)
    np.testing.assert_array_equal(verl[mask], ours[mask])
    openrlhf, _ = theirs.gae_openrlhf(rewards, values, mask, **rates)
    hole = 0.5 * 4 + 0.25 * last
    np.testing.assert_array_equal(openrlhf, row(-1 + 0.25 * hole, hole, last))


def test_masked_places_have_no_advantage(float64):
    """verl leaves the carried advantage there, and whitening moves it: harmless under a mask, but
    a plain sum or a histogram is wrong. Ours are 0.
    """
    mask, rates = np.array([[True, False, True]]), {"gamma": 1.0, "lam": 1.0}
    ours = estimated(row(0, 0, 8), row(1, 7, 4), mask, **rates)
    verl = theirs.gae_verl(row(0, 0, 8), row(1, 7, 4), mask, **rates)
    for a, b, left in zip(ours, verl, (4, 11), strict=True):
        assert (a[0, 1], b[0, 1]) == (0, left)


def test_a_truncated_response_may_go_on(float64):
    """All three take 0 for the value after the last token, so running out of room looks like an
    ending with nothing to come. Ours takes the value that the caller says follows.
    """
    rates = {"gamma": 1.0, "lam": 0.5}
    ours, _ = estimated(row(0, 0, 0), row(2, 2, 2), FULL, bootstrap=2.0, **rates)
    np.testing.assert_array_equal(ours, row(0, 0, 0))
    verl, _ = theirs.gae_verl(row(0, 0, 0), row(2, 2, 2), FULL, **rates)
    np.testing.assert_array_equal(verl, row(-0.5, -1, -2))


def test_whitening_needs_no_second_token():
    """TRL and verl divide by n - 1 (verl raises at n = 1). We scale this batch to variance 1 and
    estimate no population, so the divisor is n: defined for one token, and a batch that is given
    twice is whitened alike.
    """
    x, mask = row(3, 5, 9), np.array([[True, False, False]])
    np.testing.assert_array_equal(whiten(jnp.asarray(x), jnp.asarray(mask)), row(0, 0, 0))
    assert np.isnan(theirs.whiten_unbiased(x, mask)[mask]).all()
    twice = np.concatenate([x, x])
    once, again = (whiten(jnp.asarray(y), jnp.ones(y.shape, bool)) for y in (x, twice))
    np.testing.assert_allclose(again[0], once[0], rtol=1e-6)
    once, again = (theirs.whiten_unbiased(y, np.ones(y.shape, bool)) for y in (x, twice))
    assert (np.abs(again[0]) > 1.01 * np.abs(once[0])).all()


def test_whitening_is_over_the_whole_batch():
    """TRL whitens on each rank, Tunix in each chunk: the best answer of a poor rank gets the same
    advantage as the best of a good one, and the result depends on how many devices there are.
    """
    x = np.array([[1.0, 3.0], [101.0, 103.0]])
    apart = np.concatenate([theirs.whiten_unbiased(r[None], np.ones((1, 2), bool)) for r in x])
    np.testing.assert_allclose(apart[0], apart[1])
    together = np.asarray(whiten(jnp.asarray(x), jnp.ones(x.shape, bool)))
    assert (together[0] < 0).all()
    assert (together[1] > 0).all()


def test_epsilon_is_added_to_the_variance_not_a_floor(float64):
    """OpenRLHF bounds the variance from below at 1e-8: full unit scale down to there, then none.
    Ours fades: advantages of spread 1e-4 are mostly noise. Both leave a usual spread alone.
    """
    x, mask = row(-1e-4, 1e-4), np.ones((1, 2), bool)
    ours = whiten(jnp.asarray(x), jnp.asarray(mask))
    np.testing.assert_allclose(ours, row(-1, 1) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(theirs.whiten_floored(x, mask), row(-1, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "capped"),
    [(k3, theirs.k3_verl), (k3, theirs.k3_openrlhf), (k1, theirs.k1_openrlhf)],
)
def test_estimates_above_10_are_kept(float64, estimator, capped):
    """verl caps k3 at 10, OpenRLHF every estimate. The large ones are what makes the mean right:
    over a vocabulary of two, where policy and reference prefer different tokens, ours has the
    divergence as its expectation and theirs falls short.
    """
    policy, reference = np.array([1e-6, 1 - 1e-6]), np.array([1 - 1e-6, 1e-6])
    x = np.log(policy / reference)
    divergence = (policy * x).sum()
    np.testing.assert_allclose((policy * np.asarray(estimator(jnp.asarray(x)))).sum(), divergence)
    assert (policy * capped(x)).sum() < 0.9 * divergence


def test_k2_is_not_capped_at_10(float64):
    """OpenRLHF's is: at a log-ratio of 5 the estimate is 10 instead of 12.5, and has no slope."""
    x = np.array([5.0])
    np.testing.assert_allclose(k2(jnp.asarray(x)), [12.5])
    np.testing.assert_allclose(jax.vmap(jax.grad(k2))(jnp.asarray(x)), x)
    np.testing.assert_allclose(theirs.k2_openrlhf(x), [10.0])


def test_an_overflow_is_clamped():
    """TRL clamps neither k3 nor the ratio: one token far off makes the whole loss infinite."""
    x, clip = jnp.array([1000.0]), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    assert np.isfinite(k3(-x)).all()
    assert np.isinf(theirs.k3_unbounded(np.array([-1000.0]))).all()
    loss = clipped_policy_loss(x, 0 * x, -jnp.ones(1), **clip)
    np.testing.assert_allclose(loss, np.exp([20.0]), rtol=1e-6)
    assert np.isinf(theirs.policy_loss(x, -np.ones(1), *clip.values(), limit=np.inf)).all()


def test_a_kl_that_is_not_finite_leaves_the_coefficient():
    """In verl and OpenRLHF one NaN makes the coefficient NaN for the rest of the run, and an
    infinity, a broken measurement too, raises it.
    """
    settings = {"target": 6.0, "horizon": 300.0}
    for kl in (np.nan, np.inf):
        got = adaptive_kl_coef(jnp.array(0.05), jnp.array(kl), num_sequences=64, **settings)
        assert got == np.float32(0.05)
    assert np.isnan(theirs.next_kl_coef(0.05, np.nan, *settings.values(), 64))
    assert theirs.next_kl_coef(0.05, np.inf, *settings.values(), 64) > 0.05


def test_a_token_weighs_the_same_in_every_micro_batch(float64):
    """TRL takes the mean of each micro-batch and then the mean of those: the token of a short
    response weighs more the longer the others are, and accumulation changes the result. An empty
    micro-batch is 0 / 0. Our weights are those of the whole minibatch; verl and OpenRLHF divide by
    its count of tokens too when they are told it.
    """
    loss = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = np.array([[True, False, False], [True, True, True]])
    parts = [slice(0, 1), slice(1, 2)]
    weights = np.asarray(token_mean(jnp.asarray(mask)))
    ours = sum((weights[part] * loss[part]).sum() for part in parts)
    assert ours == theirs.mean_of_tokens(loss, mask) == 1 / 4
    assert np.mean([theirs.mean_of_tokens(loss[part], mask[part]) for part in parts]) == 1 / 2
    nothing = np.zeros((1, 3), bool)
    assert np.isnan(theirs.mean_of_tokens(loss[:1], nothing))
    np.testing.assert_array_equal(token_mean(jnp.asarray(nothing)), row(0, 0, 0))


def test_the_fixed_denominator_counts_empty_rows(float64):
    """verl leaves them out, so its denominator depends on how many responses were empty. It must
    not depend on what was sampled: that is what keeps the gradient estimate unbiased.
    """
    mask = np.array([[True, True, True], [False, False, False]])
    loss = np.ones(mask.shape)
    assert (np.asarray(fixed_mean(3)(jnp.asarray(mask))) * loss).sum() == pytest.approx(1 / 2)
    assert theirs.mean_of_sums(loss, mask, 3) == pytest.approx(1)
