"""Stages 1 to 5 composed. Noise and minibatch order come from outside: they are not PPO's."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int

from .advantages import gae
from .config import Hyperparams, IterationConfig
from .evaluation import evaluate, response_logprobs
from .learner.epochs import update
from .learner.state import TrainState
from .metrics import rollout_metrics
from .models.heads import Model
from .ops.masked import whiten
from .rewards import adaptive_kl_coef, token_rewards
from .rollout import generate
from .types import Evaluation, Experience, Prompts, Rollout


@dataclass(frozen=True)
class Trace:
    """Everything on the way from the prompts to the experience."""

    rollout: Rollout
    evaluation: Evaluation
    sequence_scores: Float64[np.ndarray, "..."]
    rewards: Float64[np.ndarray, "B T"]
    bootstrap_values: Float64[np.ndarray, " B"]
    raw_advantages: Float64[np.ndarray, "B T"]
    experience: Experience


def ppo_iteration(
    state: TrainState,
    reference: Model,
    prompts: Prompts,
    hyperparams: Hyperparams,
    noise: Float64[np.ndarray, "B T 2"],
    order: Int[np.ndarray, "steps M"],
    *,
    reward: Callable,
    config: IterationConfig,
) -> tuple[TrainState, dict[str, float], Trace]:
    """prompts -> rollout -> scores -> token rewards -> advantages -> minibatch epochs -> state."""
    if hyperparams.kl_target is None:
        state = replace(state, kl_coef=hyperparams.kl_coef)
    trace = experience_of(
        state, reference, prompts, hyperparams, noise, reward=reward, config=config
    )
    state, metrics = update(state, trace.experience, order, hyperparams, config=config)
    experience = trace.experience
    metrics |= rollout_metrics(
        trace.rollout, trace.sequence_scores,
        experience.old_logprobs - experience.reference_logprobs,
        experience.old_values, experience.returns, trace.rewards,
    )  # fmt: skip
    if hyperparams.kl_target is not None:
        kl_coef = adaptive_kl_coef(
            np.asarray(state.kl_coef), np.asarray(metrics["kl_divergence"]),
            target=hyperparams.kl_target, horizon=hyperparams.kl_horizon,
            num_sequences=len(trace.rollout.mask),
        )  # fmt: skip
        state = replace(state, kl_coef=kl_coef)
    return state, metrics, trace


def experience_of(
    state: TrainState,
    reference: Model,
    prompts: Prompts,
    hyperparams: Hyperparams,
    noise: Float64[np.ndarray, "B T 2"],
    *,
    reward: Callable,
    config: IterationConfig,
) -> Trace:
    """Stages 1 to 4."""
    temperature = hyperparams.temperature
    rollout = generate(
        state.policy, prompts, noise, config=config.generation, temperature=temperature,
        top_p=hyperparams.top_p, min_p=hyperparams.min_p,
    )  # fmt: skip
    evaluation = evaluate(state.policy, reference, state.critic, rollout, temperature=temperature)
    old_logprobs = rollout.logprobs
    if config.recompute_old_logprobs:
        old_logprobs, _ = response_logprobs(state.policy, rollout, temperature=temperature)
    sequence_scores = reward(rollout)
    rewards = token_rewards(
        sequence_scores, old_logprobs - evaluation.reference_logprobs,
        rollout.mask, rollout.terminated,
        kl_coef=state.kl_coef, kl_estimator=None if config.kl_in_loss else config.kl_estimator,
        missing_eos_penalty=hyperparams.missing_eos_penalty, score_clip=hyperparams.score_clip,
    )  # fmt: skip
    continues = ~rollout.terminated & config.bootstrap_truncated
    bootstrap_values = np.where(continues, evaluation.bootstrap_values, 0.0)
    raw_advantages, returns = gae(
        rewards, evaluation.values, rollout.mask, bootstrap_values,
        gamma=hyperparams.gamma, lam=hyperparams.lam,
    )  # fmt: skip
    advantages = raw_advantages
    if config.whiten_advantages:
        advantages = whiten(raw_advantages, rollout.mask)
    experience = Experience(
        rollout=rollout, old_logprobs=old_logprobs,
        reference_logprobs=evaluation.reference_logprobs, old_values=evaluation.values,
        advantages=advantages, returns=returns,
    )  # fmt: skip
    return Trace(
        rollout, evaluation, sequence_scores, rewards, bootstrap_values, raw_advantages, experience
    )
