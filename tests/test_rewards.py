"""Laws of token rewards and of the KL controller beyond their twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ppo_kernel.advantages import gae
from ppo_kernel.ops.kl import k1, k2
from ppo_kernel.ops.logprobs import token_logprobs
from ppo_kernel.ops.masked import masked_sum, whiten
from ppo_kernel.rewards import adaptive_kl_coef, last_valid, token_rewards
from ppo_kernel.testing import SHAPES, masks, reals, repadded_responses

SHAPE, VOCABULARY = SHAPES[0], 7
estimate = jax.jit(gae)
PLAIN = {"kl_coef": 0.0, "kl_estimator": None}


@given(reals(SHAPE[:1]), masks(SHAPE))
def test_score_lands_once_and_on_the_last_valid_token(scores, mask):
    rewards = token_rewards(
        jnp.asarray(scores, jnp.float32), jnp.zeros(SHAPE), jnp.asarray(mask),
        jnp.ones(SHAPE[0], bool), **PLAIN,
    )  # fmt: skip
    for row, score, valid in zip(np.asarray(rewards), scores, mask, strict=True):
        assert row.sum() == (score if valid.any() else 0)
        assert not valid.any() or row[np.flatnonzero(valid)[-1]] == score


@given(masks(SHAPE))
def test_a_row_has_one_last_token_or_none(mask):
    last = np.asarray(last_valid(jnp.asarray(mask)))
    np.testing.assert_array_equal(last.sum(axis=1), mask.any(axis=1))
    assert not (last & ~mask).any()


def test_a_fractional_score_survives():
    rewards = token_rewards(
        jnp.array([0.75]), jnp.zeros((1, 2)), jnp.array([[True, False]]), jnp.array([True]), **PLAIN
    )
    np.testing.assert_array_equal(rewards, [[0.75, 0.0]])


def test_the_penalty_of_a_missing_eos_is_not_clipped_and_spares_ended_and_empty_rows():
    mask = jnp.array([[True, True], [True, True], [False, False]])
    rewards = token_rewards(
        jnp.full(3, 9.0), jnp.zeros((3, 2)), mask, jnp.array([True, False, False]),
        missing_eos_penalty=5.0, score_clip=2.0, **PLAIN,
    )  # fmt: skip
    np.testing.assert_array_equal(rewards, [[0, 2], [0, -3], [0, 0]])


def test_a_truncated_response_costs_nothing_unless_one_asks_for_it():
    mask = jnp.ones((1, 2), bool)
    rewards = token_rewards(jnp.ones(1), jnp.zeros((1, 2)), mask, jnp.array([False]), **PLAIN)
    np.testing.assert_array_equal(rewards, [[0.0, 1.0]])


def test_the_penalty_is_computed_wide():
    """The square of a bfloat16 number has twice its digits."""
    log_ratios = jnp.array([[1.0078125]], jnp.bfloat16)
    rewards = token_rewards(
        jnp.zeros(1, jnp.bfloat16), log_ratios, jnp.ones((1, 1), bool), jnp.array([True]),
        kl_coef=1.0, kl_estimator=k2,
    )  # fmt: skip
    np.testing.assert_array_equal(rewards, [[-(1.0078125**2) / 2]])


@given(repadded_responses(SHAPE, VOCABULARY), reals((*SHAPE, VOCABULARY), 2), reals(SHAPE))
def test_pad_id_changes_no_reward_advantage_or_sum(response, logits, values):
    """Score, KL penalty, GAE and whitening in a chain, on the same response padded twice."""
    mask, *padded = response
    results = []
    for tokens in padded:
        logprobs = token_logprobs(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens))
        rewards = token_rewards(
            jnp.ones(SHAPE[0]), logprobs, jnp.asarray(mask), jnp.ones(SHAPE[0], bool),
            kl_coef=0.1, kl_estimator=k1,
        )  # fmt: skip
        advantages, returns = estimate(
            rewards, jnp.asarray(values, jnp.float32), jnp.asarray(mask), jnp.zeros(SHAPE[0]),
            gamma=1.0, lam=0.95,
        )  # fmt: skip
        white = whiten(advantages, jnp.asarray(mask))
        results.append((rewards, white, returns, masked_sum(logprobs, jnp.asarray(mask))))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("measured", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (600.0, 1.02), (-1.0, 0.98), (np.nan, 1.0), (np.inf, 1.0)],
)
def test_controller_moves_towards_its_target(measured, factor):
    coefficient = adaptive_kl_coef(
        jnp.array(0.05), jnp.array(measured), target=6.0, horizon=1e4, num_sequences=1000
    )
    np.testing.assert_allclose(coefficient, 0.05 * factor, rtol=1e-6)
