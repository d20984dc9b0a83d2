"""Records by hand: prompts and rollouts from plain lists of token ids."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny
from hypothesis import given

from ppo_kernel.evaluation import full_sequences, response_hidden, response_logprobs
from ppo_kernel.rollout.generate import generate
from ppo_kernel.types import Prompts, Rollout


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_prompts_are_padded_on_the_left_and_numbered(lists, spare):
    width = max(map(len, lists)) + spare
    prompts = Prompts.from_ids(lists, 7, width)
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    assert tokens.shape == mask.shape == (len(lists), width)
    assert [row[valid].tolist() for row, valid in zip(tokens, mask, strict=True)] == lists
    assert (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert (tokens[~mask] == 7).all()
    assert prompts.sample_ids.tolist() == list(range(len(lists)))


def test_the_longest_prompt_and_the_callers_ids_are_taken():
    prompts = Prompts.from_ids([[1], [2, 3]], sample_ids=[8, 5])
    assert prompts.tokens.tolist() == [[0, 1], [2, 3]]
    assert prompts.sample_ids.tolist() == [8, 5]
    assert {x.dtype.name for x in jax.tree.leaves(prompts)} == {"int32", "bool"}


@pytest.mark.parametrize(
    ("lists", "settings", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [1, 2, 3]], {"width": 2}, "prompt 1 has 3 tokens, more than width=2; truncate"),
        ([[1], [2.5]], {}, r"prompt 1 must be a list of token ids, got \[2.5\]"),
        ([[1], [2]], {"sample_ids": [3]}, r"sample_ids must be 2 whole numbers, got \[3\]"),
    ],
)
def test_prompts_that_are_refused(lists, settings, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        Prompts.from_ids(lists, **settings)


PROMPTS, RESPONSES = [[5, 6, 7], [8]], [[2, 3, tiny.EOS], []]


def test_a_rollout_from_lists_is_one_that_stage_2_reads():
    rollout = Rollout.from_responses(PROMPTS, RESPONSES, eos_token_ids=(tiny.EOS,), pad_id=9)
    assert rollout.tokens.tolist() == [[2, 3, tiny.EOS], [9, 9, 9]]
    assert rollout.mask.tolist() == [[True] * 3, [False] * 3]
    assert rollout.lengths.tolist() == [3, 0]
    assert rollout.terminated.tolist() == [True, False]
    tokens, valid = full_sequences(rollout)
    rows = zip(np.asarray(tokens), np.asarray(valid), strict=True)
    joined = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert [row[mask].tolist() for row, mask in rows] == joined
    assert tiny.even_tokens(rollout).tolist() == [1.0, 0.0]


def test_a_rollout_from_lists_equals_the_generated_one(float64):
    policy, config = tiny.language_model(), tiny.generation()
    prompts = Prompts.from_ids([[5, 6, 7], [8], [4, 4]])
    made = generate(policy, prompts, jax.random.key(0), config=config)
    responses = [row[valid].tolist() for row, valid in zip(made.tokens, made.mask, strict=True)]
    again = Rollout.from_responses(
        [[5, 6, 7], [8], [4, 4]], responses, eos_token_ids=config.eos_token_ids
    )
    for name in ("prompt_tokens", "prompt_mask", "sample_ids", "lengths", "terminated"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name), name)
    width = again.tokens.shape[1]
    np.testing.assert_array_equal(again.tokens, made.tokens[:, :width])
    logprobs, _ = response_logprobs(policy, again, response_hidden(policy, again), temperature=1.0)
    np.testing.assert_allclose(logprobs, made.logprobs[:, :width], atol=1e-12)
    assert jnp.all(again.logprobs == 0)


def test_responses_that_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="2 prompts for 1 responses"):
        Rollout.from_responses(PROMPTS, [[1]])
    with pytest.raises(ValueError, match="response 0 must be a list of token ids"):
        Rollout.from_responses([[1]], [["a"]])
