"""The supervised stages: batches, the loop, and the reward model's losses and figures."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from ppo_kernel.trainer.reward_model import (
    bradley_terry_loss,
    pair_accuracy,
    rated_pairs_loss,
    reward_model_loss,
    ridge_baseline,
    score_sequences,
)
from ppo_kernel.trainer.sft import next_token_loss, perplexity
from ppo_kernel.trainer.supervised import FitConfig, batches, fit

CONFIG = FitConfig(num_steps=60, batch_size=4, widths=(3, 6), learning_rate=3e-2, weight_decay=0.0)
SEQUENCES = [[2, 3, 4, 5, 1], [2, 6, 1], [2, 7, 8, 1], [2, 9, 10, 11, 12, 1]]


def test_batches_hold_every_sequence_once_an_epoch_split_by_length():
    stream = batches(SEQUENCES * 2, [float(i) for i in range(8)], CONFIG, np.random.default_rng(0))
    for _ in range(3):
        parts = [part for batch in itertools.islice(stream, 2) for part in batch]
        assert [part.tokens.shape for part in parts] == [(2, 3), (2, 6)] * 2
        targets = np.concatenate([part.targets for part in parts])
        assert sorted(targets.tolist()) == list(range(8))
        for part in parts:
            for tokens, mask, target in zip(part.tokens, part.mask, part.targets, strict=True):
                whole = (SEQUENCES * 2)[int(target)]
                assert tokens[mask].tolist() == whole[: part.tokens.shape[1]]
                assert not tokens[~mask].any()
    with pytest.raises(ValueError, match="do not fill one batch of 4"):
        next(batches(SEQUENCES[:3], [0.0] * 3, CONFIG, np.random.default_rng(0)))


def test_fitting_learns_the_sequences_and_leaves_the_model_passed_in():
    model = tiny.language_model()
    before = jax.tree.map(np.asarray, model)
    # No sequence is cut here: a token that training never sees would stay unlikely.
    config = dataclasses.replace(CONFIG, widths=(4, 6))
    stream = batches(SEQUENCES, [0.0] * 4, config, np.random.default_rng(0))
    reports = []
    trained = fit(
        model, next_token_loss, stream, config, report=lambda step, m: reports.append((step, m))
    )
    assert perplexity(trained, SEQUENCES, width=8) < 2.0 < perplexity(model, SEQUENCES, width=8)
    assert [step for step, _ in reports] == [10, 20, 30, 40, 50, 60]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_not_finite_stops_the_stage():
    model = tiny.language_model()
    stream = batches(SEQUENCES, [0.0] * 4, CONFIG, np.random.default_rng(0))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        fit(model, lambda m, b: next_token_loss(m, b) * jnp.nan, stream, CONFIG)


def test_next_token_loss_is_the_mean_over_all_parts():
    model = tiny.language_model()
    (batch,) = itertools.islice(batches(SEQUENCES, [0.0] * 4, CONFIG, np.random.default_rng(0)), 1)
    total, count = 0.0, 0
    for part in batch:
        for tokens, mask in zip(part.tokens, part.mask, strict=True):
            row = tokens[mask][None]
            hidden = model.hidden(row, jnp.ones(row.shape, bool))[0]
            logprobs = jax.nn.log_softmax(model.unembed(hidden))
            for slot in range(row.shape[1] - 1):
                total -= float(logprobs[slot, row[0, slot + 1]])
                count += 1
    np.testing.assert_allclose(next_token_loss(model, batch), total / count, rtol=1e-5)


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
    model = fit(start, reward_model_loss, batches(sequences, ratings, config, rng), config)
    scores = score_sequences(model, sequences, width=8, batch_size=10)
    assert scores.shape == (64,)
    assert pair_accuracy(scores, np.array(ratings), min_gap=0.25)[0] > 0.95
    ridge = ridge_baseline(sequences, ratings, sequences, vocab_size=13, penalty=1.0)
    assert pair_accuracy(ridge, np.array(ratings), min_gap=0.25)[0] > 0.9
