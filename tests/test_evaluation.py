"""What the models say of a rollout equals the reference, for empty responses too."""

import dataclasses
from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import Phase, given, settings
from oracle import assert_near, model_to_reference, to_reference

import reference.evaluation
from ppo_kernel.evaluation import (
    ModelReward,
    critic_values,
    evaluate,
    full_sequences,
    response_hidden,
    response_logprobs,
)
from ppo_kernel.models import Transformer

SHAPE = (3, 4)
CRITICS = {"separate": {"num_layers": 1}, "shared": None}


@cache
def compiled(critic, chunk_size):
    del critic

    @jax.jit
    def run(policy, frozen, critic, rollout, temperature):
        parts = {"temperature": temperature, "chunk_size": chunk_size}
        hidden = policy.hidden(*full_sequences(rollout))
        return (
            evaluate(policy, frozen, critic, rollout, **parts),
            response_logprobs(policy, rollout, hidden, **parts),
        )

    return run


def draw(critic, seed):
    rng = np.random.default_rng(seed)
    config = oracle.trunk_config(qkv_bias=True)
    settings_ = CRITICS[critic]
    critic_config = None if settings_ is None else oracle.trunk_config(**settings_)
    policy, frozen = (oracle.draw_policy(config, rng) for _ in range(2))
    critic = oracle.draw_critic(critic_config, config.hidden_size, rng)
    return policy, frozen, critic, oracle.draw_rollout(4, SHAPE, 13, rng)


@pytest.mark.parametrize(("critic", "chunk_size"), [("separate", None), ("shared", 3)])
@settings(max_examples=4, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(seed=st.integers(0, 2**32 - 1), temperature=st.floats(0.3, 3.0))
def test_scores_equal_the_reference(float64, critic, chunk_size, seed, temperature):
    policy, frozen, critic_model, rollout = draw(critic, seed)
    scores, (logprobs, entropies) = compiled(critic, chunk_size)(
        policy, frozen, critic_model, rollout, temperature
    )
    twins = [model_to_reference(model) for model in (policy, frozen, critic_model)]
    record = to_reference(rollout)
    expected = reference.evaluation.evaluate(*twins, record, temperature=temperature)
    written = np.arange(SHAPE[1])[None] < record.lengths[:, None]
    for name, want in vars(expected).items():
        got = np.asarray(getattr(scores, name))
        assert_near(np.where(written, got, 0.0) if name == "values" else got, want, name, 1e-10)
    again = reference.evaluation.response_logprobs(twins[0], record, temperature=temperature)
    assert_near(np.asarray(logprobs), again[0], "logprobs", 1e-10)
    assert_near(np.asarray(entropies), again[1], "entropies", 1e-10)


@settings(max_examples=4, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(seed=st.integers(0, 2**32 - 1))
def test_model_reward_is_the_value_after_the_last_token(float64, seed):
    _, _, model, rollout = draw("separate", seed)
    got = np.asarray(run_reward(ModelReward(model), rollout))
    want = reference.evaluation.model_reward(model_to_reference(model), to_reference(rollout))
    assert_near(got, want, "reward", 1e-10)


@jax.jit
def run_reward(reward, rollout):
    return reward(rollout)


def test_full_sequences_end_with_the_response(float64):
    rollout = draw("separate", 3)[3]
    lengths = np.array([3, 0, 4, 1], np.int32)
    tokens, valid = full_sequences(dataclasses.replace(rollout, lengths=jnp.asarray(lengths)))
    width = rollout.prompt_tokens.shape[1]
    np.testing.assert_array_equal(tokens[:, :width], rollout.prompt_tokens)
    np.testing.assert_array_equal(tokens[:, width:], rollout.tokens)
    np.testing.assert_array_equal(valid[:, :width], rollout.prompt_mask)
    np.testing.assert_array_equal(valid[:, width:], np.tri(5, 4, -1, dtype=bool)[lengths])


def test_only_the_slots_that_are_read_are_asked_for(float64, monkeypatch):
    """T + 1 per sequence, from the last prompt slot on."""
    policy, _, critic, rollout = draw("separate", 3)
    asked, forward = [], Transformer.__call__

    def watched(self, tokens, mask, start=0):
        asked.append(start)
        return forward(self, tokens, mask, start)

    monkeypatch.setattr(Transformer, "__call__", watched)
    hidden = response_hidden(policy, rollout)
    values = critic_values(critic, rollout, lambda: hidden)
    assert asked == [rollout.prompt_tokens.shape[1] - 1] * 2
    rows, length = rollout.tokens.shape
    assert hidden.shape[:2] == values.shape == (rows, length + 1)


def test_a_hole_in_the_loss_mask_is_still_read(float64):
    """The loss mask decides what is trained on, not what the models see."""
    policy, frozen, critic, rollout = draw("separate", 3)
    run = compiled("separate", None)
    scores = run(policy, frozen, critic, rollout, 1.0)
    without = type(rollout)(**(vars(rollout) | {"mask": jnp.zeros_like(rollout.mask)}))
    again = run(policy, frozen, critic, without, 1.0)
    for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
