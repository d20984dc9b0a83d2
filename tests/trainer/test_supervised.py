"""The supervised stages: batches, and the training loop."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

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
