"""Stages 1 to 5 composed: prompts in, a better policy out, as pure functions."""

import re

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .advantages import gae
from .config import Hyperparams, IterationConfig
from .evaluation import evaluate, response_hidden, response_logprobs
from .learner.epochs import update
from .learner.state import Learner, TrainState, current_kl_coef
from .metrics import nonfinite_counts, prompt_counts, rollout_metrics
from .models.protocol import Policy, vocabulary_size
from .ops.checks import check_shape
from .ops.dtypes import promote_types, upcast
from .ops.masked import whiten
from .rewards import adaptive_kl_coef, token_rewards
from .rollout.generate import generate
from .sharding import gather, shard_batch
from .types import AdvantageEstimator, Evaluation, Experience, Metrics, Prompts, RewardFn, Rollout


class Collected(eqx.Module):
    """The first half of an iteration: all that does not need the reward.

    Attributes:
        rollout: what the policy wrote.
        old_logprobs: of its tokens, under the policy that wrote them, nats.
        evaluation: reference log-probabilities and values.
    """

    rollout: Rollout
    old_logprobs: Float[Array, "B T"]
    evaluation: Evaluation


def iteration_keys(state: TrainState) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """The keys of the rollout and of the update in this iteration.

    Args:
        state: has the key of the run, and the iteration.

    Returns:
        (for `generate`, for `update`).
    """
    rollout_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.iteration))
    return rollout_key, update_key


def collect(
    state: TrainState,
    reference: Policy,
    prompts: Prompts,
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
) -> Collected:
    """Stages 1 and 2: sample responses, then reference log-probabilities and values.

    Args:
        state: not changed.
        reference: the frozen policy.
        prompts: N left-padded prompts.
        hyperparams: temperature, top-p, min-p.
        config: static settings.

    Returns:
        `Collected` for B = N * samples_per_prompt sequences.
    """
    policy = gather(state.policy)
    rollout_key, _ = iteration_keys(state)
    rollout = shard_batch(
        generate(
            policy, shard_batch(prompts), rollout_key,
            config=config.generation, temperature=hyperparams.temperature,
            top_p=hyperparams.top_p, min_p=hyperparams.min_p,
        )
    )  # fmt: skip
    settings = {"temperature": hyperparams.temperature, "chunk_size": config.logprob_chunk_size}
    evaluation = evaluate(policy, gather(reference), gather(state.critic), rollout, **settings)
    old_logprobs = rollout.logprobs
    if config.recompute_old_logprobs:
        hidden = response_hidden(policy, rollout)
        old_logprobs, _ = response_logprobs(policy, rollout, hidden, **settings)
    return shard_batch(Collected(rollout, old_logprobs, evaluation))


def learn(
    state: TrainState,
    collected: Collected,
    scores: Float[Array, " B"] | Float[Array, "B T"],
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
    learner: Learner = Learner(),
    advantage_estimator: AdvantageEstimator = gae,
) -> tuple[TrainState, Metrics]:
    """Stages 3 to 5: token rewards, advantages, and every epoch of the update.

    Args:
        state: as it was for `collect`.
        collected: from `collect`.
        scores: one a sequence or one a token, reward units.
        hyperparams, config, learner, advantage_estimator: as in `ppo_iteration`.

    Returns:
        (state, metrics) of the next iteration.

    Raises:
        ValueError: scores or advantages of a wrong shape; sizes that do not divide.
    """
    rollout, evaluation = collected.rollout, collected.evaluation
    check_shape("scores", scores, rollout.lengths.shape, rollout.tokens.shape)
    scores = shard_batch(upcast(scores))
    log_ratios = collected.old_logprobs - evaluation.reference_logprobs
    kl_coef = current_kl_coef(state, hyperparams)
    rewards = token_rewards(
        scores, log_ratios, rollout.mask, rollout.terminated,
        kl_coef=kl_coef, kl_estimator=config.reward_kl,
        missing_eos_penalty=hyperparams.missing_eos_penalty, score_clip=hyperparams.score_clip,
    )  # fmt: skip
    ended = rollout.terminated if config.bootstrap_truncated else jnp.ones_like(rollout.terminated)
    bootstrap_values = jnp.where(ended, 0.0, evaluation.bootstrap_values)
    advantages, returns = advantage_estimator(
        rewards, evaluation.values, rollout.mask, bootstrap_values,
        gamma=hyperparams.gamma, lam=hyperparams.lam,
    )  # fmt: skip
    check_shape("advantages of the estimator", advantages, rollout.tokens.shape)
    check_shape("returns of the estimator", returns, rollout.tokens.shape)
    metrics = rollout_metrics(rollout, scores, log_ratios, evaluation.values, returns, rewards)
    metrics |= prompt_counts(rollout, vocabulary_size(state.policy))
    metrics |= nonfinite_counts(rollout, collected.old_logprobs, evaluation, scores)
    if config.whiten_advantages:
        advantages = whiten(advantages, rollout.mask)
    experience = Experience(
        rollout, collected.old_logprobs, evaluation.reference_logprobs, evaluation.values,
        advantages, returns,
    )  # fmt: skip
    _, update_key = iteration_keys(state)
    state, update_metrics = update(
        state, shard_batch(experience), update_key, hyperparams,
        config=config, learner=learner,
    )  # fmt: skip
    metrics |= update_metrics | {"kl_coef": kl_coef}
    return _advance(state, metrics, hyperparams, rollout), metrics


def ppo_iteration(
    state: TrainState,
    reference: Policy,
    prompts: Prompts,
    hyperparams: Hyperparams,
    *,
    reward: RewardFn,
    config: IterationConfig,
    learner: Learner = Learner(),
    advantage_estimator: AdvantageEstimator = gae,
) -> tuple[TrainState, Metrics]:
    """One whole PPO iteration, a pure function: jit it, vmap it, or call `compile_iteration`.

        prompts -> rollout -> scores -> token rewards -> advantages -> minibatch epochs -> state

    It is `learn(state, c, reward(c.rollout), ...)` with `c = collect(state, ...)`.

    Args:
        state: from `Learner.init` or the last iteration.
        reference: the frozen policy that the KL is measured against.
        prompts: N left-padded prompts with distinct sample ids.
        hyperparams: traced; a change never recompiles.
        reward: JAX-traceable; a Python reward goes between `collect` and `learn`.
        config: static settings.
        learner: optimizers and losses.
        advantage_estimator: `gae` or your own, see `types.AdvantageEstimator`.

    Returns:
        (state, metrics), see the table in docs/metrics.md.

    Raises:
        ValueError: the reward cannot be traced or has a wrong shape; sizes that do not divide.
    """
    collected = collect(state, reference, prompts, hyperparams, config=config)
    scores = _traced_scores(gather(reward), collected.rollout)
    return learn(
        state, collected, scores, hyperparams,
        config=config, learner=learner, advantage_estimator=advantage_estimator,
    )  # fmt: skip


def _traced_scores(reward: RewardFn, rollout: Rollout) -> Float[Array, "..."]:
    """Evaluation of a reward inside the program.

    Raises:
        ValueError: it needs concrete values, calls back to Python, or has a wrong shape.
    """
    remedy = (
        "so it cannot be part of the single program; call it between `collect` and `learn`, or "
        "give a PPOTrainer a PythonReward."
    )
    try:
        jaxpr = jax.make_jaxpr(lambda rollout: jnp.asarray(reward(rollout)))(rollout)
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"reward {reward!r} needs concrete values (it runs Python on text or NumPy), {remedy}"
        ) from error
    if re.search(r"\b(\w+_callback|debug_print)\[", str(jaxpr)):
        raise ValueError(f"reward {reward!r} calls back to Python, {remedy}")
    (scores,) = jax.extend.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(rollout))
    check_shape(
        "the scores of a reward (one a sequence, or one a token)", scores,
        rollout.lengths.shape, rollout.tokens.shape,
    )  # fmt: skip
    return scores.astype(promote_types(scores.dtype, jnp.float32))


def _advance(
    state: TrainState, metrics: Metrics, hyperparams: Hyperparams, rollout: Rollout
) -> TrainState:
    kl_coef = metrics["kl_coef"]
    if hyperparams.kl_target is not None:
        kl_coef = adaptive_kl_coef(
            kl_coef, metrics["kl_divergence"],
            target=hyperparams.kl_target, horizon=hyperparams.kl_horizon,
            num_sequences=rollout.lengths.shape[0],
        )  # fmt: skip
    return eqx.tree_at(lambda s: (s.iteration, s.kl_coef), state, (state.iteration + 1, kl_coef))
