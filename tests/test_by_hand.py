"""The loop written by hand from the stages is the compiled iteration, and repeats no noise."""

from functools import partial

import equinox as eqx
import jax
import numpy as np
import pytest
import tiny

from ppo_kernel.advantages import gae
from ppo_kernel.evaluation import evaluate
from ppo_kernel.iteration import adapt_kl_coef
from ppo_kernel.learner.epochs import minibatch_order, update
from ppo_kernel.learner.state import iteration_keys
from ppo_kernel.metrics import rollout_metrics
from ppo_kernel.ops.kl import k1
from ppo_kernel.ops.masked import whiten
from ppo_kernel.program import compile_iteration
from ppo_kernel.rewards import token_rewards
from ppo_kernel.rollout.generate import generate
from ppo_kernel.types import Experience

CONFIG = tiny.iteration_config()


@eqx.filter_jit
def by_hand(state, reference, prompts, hyperparams):
    """One iteration: (state, rollout, order of the minibatches)."""
    policy, key = state.policy, iteration_keys(state).rollout
    rollout = generate(policy, prompts, key, config=CONFIG.generation, temperature=1.0)
    order = minibatch_order(iteration_keys(state).update, rollout.sample_ids, 2, 2)
    evaluation = evaluate(policy, reference, state.critic, rollout, temperature=1.0)
    log_ratios = rollout.logprobs - evaluation.reference_logprobs
    scores, mask = tiny.even_tokens(rollout), rollout.mask
    rewards = token_rewards(
        scores, log_ratios, mask, rollout.terminated, kl_coef=state.kl_coef, kl_estimator=k1
    )
    advantages, returns = gae(rewards, evaluation.values, mask, gamma=1.0, lam=0.95)
    experience = Experience(
        rollout=rollout, old_logprobs=rollout.logprobs,
        reference_logprobs=evaluation.reference_logprobs, old_values=evaluation.values,
        advantages=whiten(advantages, mask), returns=returns,
    )  # fmt: skip
    state, _ = update(state, experience, hyperparams, config=CONFIG)
    metrics = rollout_metrics(rollout, scores, log_ratios, evaluation.values, returns, rewards)
    state = adapt_kl_coef(
        state, hyperparams, kl_divergence=metrics["kl_divergence"], num_sequences=len(mask)
    )
    return state, rollout, order


def test_at_learning_rate_0_the_second_iteration_draws_other_tokens_in_another_order():
    policy, hyperparams = tiny.language_model(), tiny.hyperparams(0.0)
    state = tiny.start(hyperparams, policy=policy)
    run = partial(by_hand, reference=policy, prompts=tiny.prompts(), hyperparams=hyperparams)
    after, first, first_order = run(state)
    again, second, second_order = run(after)
    tiny.assert_trees_close(again.trained, state.trained, 0.0)
    assert (first.tokens != second.tokens).any()
    assert (first_order != second_order).any()


@pytest.mark.parametrize("kl_target", [None, 0.1])
def test_by_hand_is_the_compiled_iteration(float64, kl_target):
    policy, reference = tiny.language_model(), tiny.language_model(seed=8)
    hyperparams = tiny.hyperparams(1e-2, kl_target=kl_target)
    hand = compiled = tiny.start(hyperparams, policy=policy)
    ppo = compile_iteration(config=CONFIG)
    compiled = jax.tree.map(lambda x: x.copy(), compiled)
    for _ in range(2):
        hand, _, _ = by_hand(hand, reference, tiny.prompts(), hyperparams)
        compiled, _ = ppo.step(compiled, reference, tiny.prompts(), hyperparams, tiny.even_tokens)
    tiny.assert_trees_close(hand, compiled, 1e-10)
    assert int(hand.iteration) == 2
    assert (float(hand.kl_coef) != float(hyperparams.kl_coef)) == (kl_target is not None)


def test_another_temperature_than_the_rollout_s_shows_in_the_first_step():
    """Nothing has moved there: the log-ratio is rounding, unless two policies are meant."""
    policy = tiny.language_model()
    sizes = []
    for temperature in (1.0, 0.5):
        hyperparams = tiny.hyperparams(temperature=temperature)
        state = tiny.start(tiny.hyperparams(), policy=policy)
        ppo = compile_iteration(config=CONFIG)
        collected = ppo.collect(state, policy, tiny.prompts(), tiny.hyperparams())
        scores = tiny.even_tokens(collected.rollout)
        _, metrics = ppo.learn(state, collected, scores, hyperparams)
        sizes.append(float(metrics["initial_log_ratio"]))
    assert sizes[0] < 1e-5
    assert sizes[1] > 0.1
    assert np.isfinite(sizes).all()
