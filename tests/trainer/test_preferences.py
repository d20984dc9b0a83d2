"""The reward model from pairs: its batches, its loss, and whom it takes for the better one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ppo_kernel.trainer.preferences import (
    TokenPair,
    pair_batches,
    preference_accuracy,
    preference_loss,
)
from ppo_kernel.trainer.supervised import FitConfig, fit

CONFIG = FitConfig(num_steps=80, batch_size=4, widths=(4, 8), learning_rate=2e-2)


def pairs(count=32, seed=0):
    """The chosen response begins with 9, the rejected one with 10; lengths differ."""
    rng = np.random.default_rng(seed)

    def response(first):
        return [2, first, *rng.integers(3, 9, rng.integers(0, 4)).tolist(), tiny.EOS]

    return [TokenPair(response(9), response(10)) for _ in range(count)]


def score(model, row):
    return float(model(jnp.asarray([row]), jnp.ones((1, len(row)), bool))[0, -1])


def test_every_pair_stays_together_and_whole_whatever_its_length():
    rows = pairs(8)
    stream = pair_batches(rows, CONFIG, np.random.default_rng(0))
    for _ in range(3):
        seen = []
        for part in itertools.chain(*itertools.islice(stream, 2)):
            ids = [row[mask].tolist() for row, mask in zip(part.tokens, part.mask, strict=True)]
            seen += [TokenPair(*pair) for pair in zip(ids[:2], ids[2:], strict=True)]
            assert part.tokens.shape[1] in CONFIG.widths
        assert sorted(map(repr, seen)) == sorted(map(repr, rows))
    with pytest.raises(ValueError, match="3 pairs do not fill one batch of 4"):
        next(pair_batches(rows[:3], CONFIG, np.random.default_rng(0)))


def test_the_loss_is_the_loop_over_pairs():
    model, rows = tiny.value_model(), pairs(4)
    batch = next(pair_batches(rows, CONFIG, np.random.default_rng(0)))
    losses = [np.logaddexp(0.0, score(model, p.rejected) - score(model, p.chosen)) for p in rows]
    np.testing.assert_allclose(preference_loss(model, batch), np.mean(losses), rtol=1e-5)


def test_accuracy_counts_pairs_and_half_of_a_tie():
    model, rows = tiny.value_model(), pairs(9)
    right = np.mean([score(model, p.chosen) > score(model, p.rejected) for p in rows])
    assert preference_accuracy(model, rows, width=8, batch_size=4) == pytest.approx(right)
    tied = jax.tree.map(jnp.zeros_like, model)
    assert preference_accuracy(tied, rows, width=8, batch_size=4) == 0.5


def test_a_reward_model_learns_whom_people_prefer():
    stream = pair_batches(pairs(), CONFIG, np.random.default_rng(0))
    model = fit(tiny.value_model(), preference_loss, stream, CONFIG)
    unseen = pairs(seed=1)
    assert preference_accuracy(model, unseen, width=8, batch_size=16) > 0.9
    swapped = [TokenPair(pair.rejected, pair.chosen) for pair in unseen]
    assert preference_accuracy(model, swapped, width=8, batch_size=16) < 0.1
