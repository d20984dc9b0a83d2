"""Law 5: what GAE is, beyond its row in the table of twins."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from ppo_kernel.advantages import gae
from ppo_kernel.testing import SHAPES, TOLERANCES, masks, reals
from reference import advantages as reference

SHAPE, GAMMA = SHAPES[0], 0.9
TIGHT = TOLERANCES["float64"]
rollouts = given(rollout=st.tuples(reals(SHAPE), reals(SHAPE), masks(SHAPE), reals(SHAPE[:1])))
estimate = jax.jit(gae)


def rows(rewards, values, mask, bootstrap):
    """(validity, rewards, values and bootstrap value) of a row; the last two of valid tokens."""
    for b, valid in enumerate(mask):
        yield valid, rewards[b][valid], np.append(values[b][valid], bootstrap[b])


@rollouts
def test_law_5_lambda_0_is_the_td_residual(float64, rollout):
    advantages, _ = estimate(*map(jnp.asarray, rollout), gamma=GAMMA, lam=0.0)
    for advantage, (valid, reward, value) in zip(advantages, rows(*rollout), strict=True):
        np.testing.assert_allclose(
            advantage[valid], reward + GAMMA * value[1:] - value[:-1], *TIGHT
        )


@rollouts
def test_law_5_lambda_1_is_the_discounted_return_minus_the_value(float64, rollout):
    advantages, returns = estimate(*map(jnp.asarray, rollout), gamma=GAMMA, lam=1.0)
    for b, (valid, reward, value) in enumerate(rows(*rollout)):
        earned = np.append(reward, value[-1])
        future = [np.polyval(earned[t:][::-1], GAMMA) for t in range(len(reward))]
        np.testing.assert_allclose(returns[b][valid], future, *TIGHT)
        np.testing.assert_allclose(advantages[b][valid], future - value[:-1], *TIGHT)


@rollouts
def test_law_5_scan_is_the_numpy_loop(float64, rollout):
    """Other types and coefficients, eager and vmapped: its row in twins.py."""
    results = estimate(*map(jnp.asarray, rollout), gamma=GAMMA, lam=0.95)
    for shipped, looped in zip(
        results, reference.gae(*rollout, gamma=GAMMA, lam=0.95), strict=True
    ):
        np.testing.assert_allclose(shipped, looped, *TIGHT)


def nearest(later, earlier):
    """Composition of affine maps x -> slope * x + offset, the later token's first."""
    return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]


def associative_gae(rewards, values, mask, bootstrap, gamma, lam):
    def backwards(slope, offset, start):
        slope, offset = jax.lax.associative_scan(nearest, (slope, offset), reverse=True, axis=1)
        return slope * start[:, None] + offset

    # The value at or after t: x -> V_t at a valid token, x -> x in a hole.
    here = backwards(jnp.where(mask, 0.0, 1.0), jnp.where(mask, values, 0.0), bootstrap)
    following = jnp.concatenate([here[:, 1:], bootstrap[:, None]], axis=1)
    delta = jnp.where(mask, rewards + gamma * following - values, 0.0)
    slope = jnp.where(mask, gamma * lam, 1.0)
    return jnp.where(mask, backwards(slope, delta, jnp.zeros_like(bootstrap)), 0.0)


@rollouts
def test_law_5_scan_is_the_associative_scan(float64, rollout):
    arrays = list(map(jnp.asarray, rollout))
    advantages, _ = estimate(*arrays, gamma=GAMMA, lam=0.95)
    np.testing.assert_allclose(advantages, associative_gae(*arrays, GAMMA, 0.95), *TIGHT)


@rollouts
def test_law_5_holes_in_the_mask_carry(float64, rollout):
    """Moving the valid tokens of a row together moves their advantages and changes none."""
    mask = rollout[2]
    order = np.argsort(~mask, axis=1, kind="stable")
    packed = [np.take_along_axis(x, order, axis=1) if x.ndim == 2 else x for x in rollout]
    results = [estimate(*map(jnp.asarray, x), gamma=GAMMA, lam=0.95) for x in (rollout, packed)]
    for spread, together in zip(*results, strict=True):
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(spread), order, 1), together, *TIGHT
        )


def test_sweeping_gamma_and_lambda_is_a_loop_over_them():
    arrays = jnp.ones((2, 5)), jnp.zeros((2, 5)), jnp.ones((2, 5), bool), jnp.ones(2)
    gammas, lams = jnp.array([0.5, 1.0]), jnp.array([0.0, 0.9])
    swept, _ = jax.vmap(lambda gamma, lam: gae(*arrays, gamma=gamma, lam=lam))(gammas, lams)
    looped = [gae(*arrays, gamma=g, lam=x)[0] for g, x in zip(gammas, lams, strict=True)]
    np.testing.assert_allclose(swept, looped, rtol=1e-6)
