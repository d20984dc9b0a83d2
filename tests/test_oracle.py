"""The whole iteration, in float64, equals the NumPy oracle: every stage, every step, every number.

Parameters, prompts and hyper-parameters are drawn; static settings come from `CASES`, because
each of those compiles once.
"""

from functools import cache
from unittest import mock

import equinox as eqx
import hypothesis.strategies as st
import jax
import numpy as np
import optax
import oracle
import pytest
import tiny
from hypothesis import Phase, assume, given, settings
from oracle import assert_near, model_to_reference, parameters_of, to_reference
from oracle_cases import CASES, FLOAT32_CASES, hyperparameters

import reference.iteration
import reference.learner.state
from ppo_kernel import iteration
from ppo_kernel.advantages import gae, whitened
from ppo_kernel.iteration import collect
from ppo_kernel.learner.epochs import minibatch_order
from ppo_kernel.learner.state import Learner, iteration_keys
from ppo_kernel.ops.sampling import sampling_noise
from ppo_kernel.testing import NORM_TOLERANCES


@cache
def compiled(case):
    """The shipped iteration of a case, which also hands out what passes between its stages."""

    @eqx.filter_jit
    def iterate(state, reference_policy, prompts, hyperparams):
        seen = {}

        def keep_collected(*inputs, **parts):
            seen["collected"] = collect(*inputs, **parts)
            return seen["collected"]

        def estimator(rewards, values, mask, bootstrap_values, **discounts):
            advantages, returns = gae(rewards, values, mask, bootstrap_values, **discounts)
            seen["arrays"] = (rewards, values, bootstrap_values, advantages, returns)
            return advantages, returns

        if case.whiten:
            estimator = whitened(estimator)
        with mock.patch.object(iteration, "collect", keep_collected):
            new_state, metrics = iteration.ppo_iteration(
                state, reference_policy, prompts, hyperparams,
                reward=case.reward.shipped, config=case.config(), advantage_estimator=estimator,
            )  # fmt: skip
        sample_ids = seen["collected"].rollout.sample_ids
        return new_state, metrics, seen | drawn_from_key(case, state, sample_ids)

    return iterate


def drawn_from_key(case, state, sample_ids):
    """The noise and the order that the shipped iteration draws from its key."""
    config = case.config()
    rollout_key, update_key = iteration_keys(state)
    return {
        "noise": sampling_noise(rollout_key, sample_ids, config.generation.max_new_tokens),
        "order": minibatch_order(update_key, sample_ids, config.num_epochs, config.num_minibatches),
    }


def assert_same_experience(seen, trace, relative=NORM_TOLERANCES["float64"]):
    collected, expected = seen["collected"], trace.experience
    rollout, mask = collected.rollout, trace.rollout.mask
    for name in ("prompt_tokens", "prompt_mask", "sample_ids", "tokens", "mask", "lengths",
                 "terminated"):  # fmt: skip
        np.testing.assert_array_equal(getattr(rollout, name), getattr(trace.rollout, name), name)
    rewards, values, bootstrap_values, advantages, returns = seen["arrays"]
    for name, got, want in (
        ("logprobs", rollout.logprobs, trace.rollout.logprobs),
        ("behaviour", rollout.behaviour_logprobs, trace.rollout.behaviour_logprobs),
        ("old logprobs", collected.old_logprobs, expected.old_logprobs),
        (
            "reference logprobs",
            collected.evaluation.reference_logprobs,
            expected.reference_logprobs,
        ),
        # Past the end of a response the shipped values mean nothing.
        ("values", np.where(mask, values, 0.0), expected.old_values),
        ("last values", collected.evaluation.bootstrap_values, trace.evaluation.bootstrap_values),
        ("bootstrap values", bootstrap_values, trace.bootstrap_values),
        ("rewards", rewards, trace.rewards),
        ("advantages", advantages, trace.raw_advantages),
        ("returns", returns, expected.returns),
    ):
        assert_near(np.asarray(got), want, name, relative)


def assert_same_state(state, expected):
    """Parameters, and Adam's moments: the first one is a running mean of the gradients."""
    for role, optimizer_state, model, twin, moments in (
        ("policy", state.actor_optimizer_state, state.policy, expected.policy,
         expected.actor_moments),
        ("critic", state.critic_optimizer_state, state.critic, expected.critic,
         expected.critic_moments),
    ):  # fmt: skip
        if model is None:
            assert optimizer_state is twin is moments is None
            continue
        assert isinstance(optimizer_state, optax.ScaleByAdamState)
        assert int(optimizer_state.count) == moments.count
        assert_near(parameters_of(optimizer_state.mu), moments.first, f"{role}, first moment")
        assert_near(parameters_of(optimizer_state.nu), moments.second, f"{role}, second moment")
        assert_near(parameters_of(model), twin.parameters, f"{role}, parameters")
    assert_near(np.asarray(state.kl_coef), np.asarray(expected.kl_coef), "KL coefficient")
    assert int(state.iteration) == expected.iteration


def start(case, data):
    """(random numbers, shipped state, the reference's, frozen policy, hyper-parameters)."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    hyperparams = tiny.hyperparams(**data.draw(hyperparameters(case), "hyperparameters"))
    trunk = case.trunk_config()
    policy, frozen = (oracle.draw_policy(trunk, rng) for _ in range(2))
    critic = case.draw_critic(rng)
    key = jax.random.key(int(rng.integers(2**31)))
    state = Learner().init(policy, critic, key, hyperparams)
    expected = reference.learner.state.TrainState.start(
        model_to_reference(policy), model_to_reference(critic), float(hyperparams.kl_coef)
    )
    return rng, state, expected, frozen, hyperparams


def iterate_both(case, rng, state, expected, frozen, hyperparams):
    """One iteration: (state, metrics, what was seen), and the same of the reference."""
    # A sequence of one repeated token has no gradient in its queries and keys; Adam would
    # make a step of the rounding error that is left. Two distinct tokens keep it away.
    prompts = oracle.draw_prompts(*case.prompts, case.trunk_config().vocab_size, rng, shortest=2)
    shipped = compiled(case)(state, frozen, prompts, hyperparams)
    seen = shipped[-1]
    judge = reference.iteration.ppo_iteration(
        expected, model_to_reference(frozen), to_reference(prompts), to_reference(hyperparams),
        np.float64(seen["noise"]), np.asarray(seen["order"]),
        reward=case.reward.reference, config=case.reference_config(),
    )  # fmt: skip
    return shipped, judge


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=3, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_law_10_the_whole_iteration_is_the_numpy_oracle(float64, case, data):
    rng, state, expected, frozen, hyperparams = start(case, data)
    for _ in range(2):
        shipped, judge = iterate_both(case, rng, state, expected, frozen, hyperparams)
        state, metrics, seen = shipped
        expected, expected_metrics, trace = judge
        assert_same_experience(seen, trace)
        assert_same_state(state, expected)
        for name, number in expected_metrics.items():
            assert_near(np.asarray(metrics[name]), np.asarray(number), name)


@pytest.mark.parametrize("case", FLOAT32_CASES, ids=str)
@settings(max_examples=5, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_law_10_in_float32_up_to_its_roundings(case, data):
    shipped, judge = iterate_both(case, *start(case, data))
    (state, _, seen), (expected, _, trace) = shipped, judge
    # A draw whose margin is below the rounding of a running sum may fall to another token.
    assume(np.array_equal(seen["collected"].rollout.tokens, trace.rollout.tokens))
    assert_same_experience(seen, trace, NORM_TOLERANCES["float32 forward"])
    gradient = NORM_TOLERANCES["float32 gradient"]
    for role, moments, twin in (
        ("policy", state.actor_optimizer_state, expected.actor_moments),
        ("critic", state.critic_optimizer_state, expected.critic_moments),
    ):
        assert_near(parameters_of(moments.mu), twin.first, f"{role} gradient", gradient)
