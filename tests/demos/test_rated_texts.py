"""The reward model from rated texts: its loss, its figures, and the baseline."""

import itertools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import tiny
from hypothesis import given
from hypothesis import strategies as st

from ppo_kernel.demos.rated_texts import (
    pair_accuracy,
    rated_pairs_loss,
    rated_texts_loss,
    ridge_baseline,
)
from ppo_kernel.trainer.preferences import bradley_terry_loss, score_sequences
from ppo_kernel.trainer.supervised import FitConfig, batches, fit


@given(st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8)), min_size=4, max_size=4))
def test_rated_pairs_loss_is_the_loop_over_pairs(rows):
    scores = np.array([a / 2 for a, _ in rows], np.float32)
    ratings = np.array([b / 2 for _, b in rows], np.float32)
    total = 0.0
    for i, j in itertools.combinations(range(4), 2):
        wanted = 1 / (1 + np.exp(-0.7 * (ratings[i] - ratings[j])))
        won = -np.logaddexp(0.0, scores[j] - scores[i])
        lost = -np.logaddexp(0.0, scores[i] - scores[j])
        total -= wanted * won + (1 - wanted) * lost
    got = rated_pairs_loss(jnp.asarray(scores), jnp.asarray(ratings), sharpness=0.7)
    np.testing.assert_allclose(got, total / 6, rtol=1e-5)
    np.testing.assert_allclose(
        bradley_terry_loss(jnp.asarray(scores), jnp.asarray(ratings)),
        np.logaddexp(0.0, ratings - scores),
        rtol=1e-5,
    )


def test_pair_accuracy_counts_pairs_by_gap():
    ratings, scores = np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 2.0])
    assert pair_accuracy(scores, ratings, min_gap=0.0) == (2.5 / 3, 3)
    assert pair_accuracy(scores, ratings, min_gap=2.0) == (1.5 / 2, 2)
    assert pair_accuracy(scores, ratings, min_gap=9.0) == (0.5, 0)


def test_a_reward_model_learns_an_order_that_ridge_learns_too():
    rng = np.random.default_rng(0)
    sequences = [[2, *rng.integers(3, 13, 4).tolist(), 1] for _ in range(64)]
    ratings = [float(np.mean([token >= 8 for token in s[1:-1]])) for s in sequences]
    config = FitConfig(num_steps=200, batch_size=16, widths=(6,), learning_rate=2e-2, average=0.9)
    start = eqx.tree_at(lambda m: m.head.weight, tiny.value_model(), jnp.zeros(16))
    model = fit(start, rated_texts_loss, batches(sequences, ratings, config, rng), config)
    scores = score_sequences(model, sequences, width=8, batch_size=10)
    assert scores.shape == (64,)
    assert pair_accuracy(scores, np.array(ratings), min_gap=0.25)[0] > 0.95
    ridge = ridge_baseline(sequences, ratings, sequences, vocab_size=13, penalty=1.0)
    assert pair_accuracy(ridge, np.array(ratings), min_gap=0.25)[0] > 0.9
