"""Numerical edges that need a program of their own: bans, one token, pad ids, types."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from edges import (
    K3_LOSS,
    SETTINGS,
    STEPS,
    BanningPolicy,
    assert_finite,
    assert_unchanged,
    one_step,
)

from ppo_kernel.config import Hyperparams
from ppo_kernel.evaluation import full_sequences, response_logprobs
from ppo_kernel.iteration import collect
from ppo_kernel.program import compile_iteration


def test_tokens_that_the_policy_bans_are_no_edge():
    policy = BanningPolicy(tiny.language_model())
    state, metrics = one_step(tiny.iteration_config(**K3_LOSS), policy, tiny.prompts())
    assert_finite(state, metrics)
    assert metrics["skipped_minibatches"] == 0
    rollout = jax.jit(
        lambda: (
            collect(
                state, policy, tiny.prompts(), Hyperparams(), config=tiny.iteration_config()
            ).rollout
        )
    )()
    assert not np.isin(rollout.tokens[rollout.mask], policy.banned).any()


def test_tokens_that_the_reference_bans_are_infinitely_unlikely_and_counted():
    hyperparams, policy = tiny.hyperparams(**SETTINGS), tiny.language_model()
    state = tiny.start(hyperparams, policy=policy)
    reference = BanningPolicy(policy)
    after, metrics = tiny.one_step(
        state, reference, tiny.prompts(), hyperparams, tiny.iteration_config()
    )
    assert metrics["nonfinite_logprobs"] >= 1
    assert metrics["kl_divergence"] == np.inf
    assert metrics["skipped_minibatches"] == STEPS
    assert_unchanged(after, state)


def test_a_vocabulary_of_one_and_a_response_of_eos_alone():
    """A batch of one, too: nothing can be learnt about tokens, and nothing breaks."""
    policy = tiny.language_model(vocab_size=1)
    batch = dataclasses.replace(tiny.prompts((2,)), tokens=jnp.zeros((1, 4), jnp.int32))
    config = tiny.iteration_config(
        tiny.generation(eos_token_ids=(0,)), num_minibatches=1, **K3_LOSS
    )
    state, metrics = one_step(config, policy, batch)
    assert_finite(state, metrics)
    expected = {
        "response_length": 1.0, "truncated_fraction": 0.0, "kl_divergence": 0.0, "entropy": 0.0,
        "approx_kl": 0.0, "actor_loss": 0.0, "grad_norm_actor": 0.0, "skipped_minibatches": 0.0,
        "reward_std": 0.0, "explained_variance": 0.0,
    }  # fmt: skip
    assert {name: float(metrics[name]) for name in expected} == expected
    rollout = collect(state, policy, batch, Hyperparams(), config=config).rollout
    np.testing.assert_array_equal(rollout.mask, [[True, False, False, False, False]])
    np.testing.assert_array_equal(rollout.logprobs, np.zeros((1, 5)))


@pytest.mark.parametrize("eos", [(13,), (1, 99)])
def test_an_eos_outside_of_the_vocabulary_is_refused(eos):
    config = tiny.iteration_config(tiny.generation(eos_token_ids=eos))
    with pytest.raises(ValueError, match=rf"eos_token_ids \[{eos[-1]}\] .* of 13 tokens"):
        one_step(config, tiny.language_model(), tiny.prompts())


def test_a_ban_of_every_token_is_refused():
    generation = tiny.generation(eos_token_ids=tuple(range(13)), min_new_tokens=1)
    with pytest.raises(ValueError, match=r"min_new_tokens=1 bans .* nothing is left"):
        one_step(tiny.iteration_config(generation), tiny.language_model(), tiny.prompts())


def test_a_pad_id_outside_of_the_vocabulary_changes_nothing():
    results = []
    for pad in (tiny.PAD, 10**6):
        config = tiny.iteration_config(tiny.generation(pad_token_id=pad))
        results.append(one_step(config, tiny.language_model(), tiny.prompts(pad=pad)))
    (state, metrics), (other, other_metrics) = results
    assert_finite(other, other_metrics)
    assert_unchanged(other, state)
    assert float(metrics["truncated_fraction"]) < 1, "some response must be padded"


def test_a_constant_reward_has_no_advantage_and_no_noise():
    """Zero variance under whitening."""
    hyperparams = tiny.hyperparams(**(SETTINGS | {"kl_coef": 0.0, "entropy_coef": 0.0, "lam": 1.0}))
    hyperparams = eqx.tree_at(lambda h: h.missing_eos_penalty, hyperparams, jnp.zeros(()))
    critic = jax.tree.map(jnp.zeros_like, tiny.value_model())
    state = tiny.start(hyperparams, critic=critic)

    def constant(rollout):
        return jnp.full(rollout.lengths.shape, 0.5)

    after, metrics = tiny.one_step(
        state, tiny.language_model(), tiny.prompts(), hyperparams, tiny.iteration_config(),
        reward=constant,
    )  # fmt: skip
    assert float(metrics["grad_norm_actor"]) == 0.0
    assert float(metrics["skipped_minibatches"]) == 0.0
    assert float(metrics["explained_variance"]) == 0.0
    assert_finite(after, metrics)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_computes_what_float32_does_to_its_rounding(param_dtype):
    types = {"param_dtype": param_dtype, "compute_dtype": "bfloat16", "cache_dtype": "bfloat16"}
    narrow, critic = tiny.language_model(**types), tiny.value_model(**types)
    wide = _in_float32(narrow)
    config = tiny.iteration_config(recompute_old_logprobs=True)
    state, metrics = one_step(config, narrow, tiny.prompts(), critic)
    assert_finite(state, metrics)
    assert metrics["skipped_minibatches"] == 0
    assert state.policy.output.dtype == param_dtype
    moments = state.actor_optimizer_state.mu, state.critic_optimizer_state.mu
    for x in (*metrics.values(), *jax.tree.leaves(moments)):
        assert x.dtype == jnp.float32
    unchanged = tiny.start(Hyperparams(), policy=narrow)
    iteration = compile_iteration(config=config)
    collected = iteration.collect(unchanged, narrow, tiny.prompts(), Hyperparams())
    rollout = collected.rollout
    np.testing.assert_array_equal(collected.old_logprobs, collected.evaluation.reference_logprobs)
    np.testing.assert_allclose(collected.old_logprobs, rollout.logprobs, atol=1e-5)
    hidden = wide.hidden(*full_sequences(rollout))
    exact, _ = response_logprobs(wide, rollout, hidden, temperature=1.0)
    # Log-probabilities of a few nats after some ten roundings of 2^-8.
    np.testing.assert_allclose(collected.old_logprobs, exact, atol=0.25)
    np.testing.assert_allclose(rollout.logprobs, exact, atol=0.25)


def _in_float32(model):
    config = dataclasses.replace(
        model.trunk.config, param_dtype="float32", compute_dtype="float32", cache_dtype="float32"
    )
    model = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    return dataclasses.replace(model, trunk=dataclasses.replace(model.trunk, config=config))
