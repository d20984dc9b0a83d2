"""Without a critic: no forward pass, gradient, moments or memory of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ppo_kernel.advantages import gae
from ppo_kernel.config import Hyperparams
from ppo_kernel.models import Transformer, ValueModel
from ppo_kernel.program import compile_iteration

CONFIG = tiny.iteration_config()


def lowered(critic):
    policy, hyperparams = tiny.language_model(hidden_size=64, intermediate_size=128), Hyperparams()
    ppo = compile_iteration(config=CONFIG)
    state = ppo.init(policy, critic, jax.random.key(0), hyperparams)
    return ppo.lower(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens).compile()


def test_nothing_of_a_critic_is_computed_or_stored():
    critic = tiny.value_model(hidden_size=64, intermediate_size=128)
    without, with_one = lowered(None), lowered(critic)
    parameters = sum(x.nbytes for x in jax.tree.leaves(critic))
    arguments = [x.memory_analysis().argument_size_in_bytes for x in (without, with_one)]
    # Its parameters, two moments, the count of Adam's steps and two rates.
    saved = arguments[1] - arguments[0]
    assert 3 * parameters <= saved <= 3 * parameters + 64
    temporary = [x.memory_analysis().temp_size_in_bytes for x in (without, with_one)]
    assert temporary[0] <= temporary[1]
    flops = [x.cost_analysis()["flops"] for x in (without, with_one)]
    assert flops[0] < 0.75 * flops[1]


def test_values_are_zero_and_its_metrics_absent():
    policy, hyperparams = tiny.language_model(), tiny.hyperparams(1e-2, gamma=0.9)
    seen = []

    def noting(rewards, values, mask, bootstrap_values, **settings):
        seen.append((values.shape, bootstrap_values.shape))
        advantages, returns = gae(rewards, values, mask, bootstrap_values, **settings)
        return advantages + values, returns + bootstrap_values[:, None]

    ppo = compile_iteration(config=CONFIG, advantage_estimator=noting)
    state = ppo.init(policy, None, jax.random.key(0), hyperparams)
    assert state.critic is None
    assert state.critic_optimizer_state is None
    collected = ppo.collect(state, policy, tiny.prompts(), hyperparams)
    assert not collected.evaluation.values.any()
    assert not collected.evaluation.bootstrap_values.any()
    after, metrics = ppo.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
    assert seen == [((8, 5), (8,))]
    assert not {"critic_loss", "grad_norm_critic"} & metrics.keys()
    assert metrics["value_mean"] == metrics["nonfinite_values"] == 0.0
    np.testing.assert_allclose(metrics["explained_variance"], 0.0, atol=1e-6)
    assert metrics["skipped_minibatches"] == 0
    assert after.critic is None
    assert bool((after.policy.output != policy.output).any())


def test_the_policy_steps_as_beside_a_critic_of_zeros(float64):
    """A critic that cannot move changes nothing for the policy."""
    policy, hyperparams = (
        tiny.language_model(),
        tiny.hyperparams(1e-2, critic={"learning_rate": 0.0}),
    )
    zeros = ValueModel.on(Transformer.init(jax.random.key(1), tiny.transformer_config()))
    policies = []
    for critic in (None, zeros):
        state = tiny.start(hyperparams, policy=policy, critic=critic, no_critic=critic is None)
        after, _ = tiny.one_step(state, policy, tiny.prompts(), hyperparams, CONFIG)
        policies.append(after.policy)
    tiny.assert_trees_close(*policies, 1e-12)


def test_a_bootstrap_needs_a_critic():
    policy, hyperparams = tiny.language_model(), Hyperparams()
    ppo = compile_iteration(config=tiny.iteration_config(bootstrap_truncated=True))
    state = ppo.init(policy, None, jax.random.key(0), hyperparams)
    with pytest.raises(ValueError, match="bootstrap_truncated takes the critic's value"):
        ppo.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)


def test_groups_are_the_samples_of_a_prompt():
    seen = []

    def noting(rewards, values, mask, bootstrap_values, *, groups, **settings):
        jax.debug.callback(seen.append, groups)
        return rewards, jnp.zeros_like(rewards)

    policy, hyperparams = tiny.language_model(), Hyperparams()
    config = tiny.iteration_config(tiny.generation(samples_per_prompt=2))
    ppo = compile_iteration(config=config, advantage_estimator=noting)
    state = ppo.init(policy, None, jax.random.key(0), hyperparams)
    ppo.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], np.repeat(tiny.prompts().sample_ids, 2))
