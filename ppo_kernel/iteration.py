"""Stages 1 to 5 composed: prompts in, a better policy out, as pure functions."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .advantages import gae, whitened
from .config import Hyperparams, IterationConfig
from .evaluation import evaluate, response_hidden, response_logprobs
from .functions import AdvantageEstimator, RewardFn
from .learner.epochs import update
from .learner.reports import join
from .learner.state import TrainState, current_kl_coef, iteration_keys
from .metrics import nonfinite_counts, prompt_counts, reward_metrics, rollout_metrics
from .models.protocol import Policy, vocabulary_size
from .ops.checks import check_pair, check_shape
from .ops.dtypes import promote_types, upcast
from .rewards import adaptive_kl_coef, token_rewards
from .rollout.generate import generate
from .sharding import gather, shard_batch
from .types import Evaluation, Experience, Metrics, Prompts, Rollout


class Collected(eqx.Module):
    """The first half of an iteration: all that does not need the reward.

    Attributes:
        rollout: what the policy sampled.
        old_logprobs: of its tokens, under the policy that sampled them, nats.
        evaluation: reference log-probabilities and values.
    """

    rollout: Rollout
    old_logprobs: Float[Array, "B T"]
    evaluation: Evaluation


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
    rollout = shard_batch(
        generate(
            policy, shard_batch(prompts), iteration_keys(state).rollout,
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
    scores: PyTree,
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
    advantage_estimator: AdvantageEstimator = whitened(gae),
) -> tuple[TrainState, Metrics]:
    """Stages 3 to 5: token rewards, advantages, and every epoch of the update.

    Args:
        state: as it was for `collect`.
        collected: from `collect`.
        scores: what the reward returned (see `functions.RewardFn`): one score per sequence or one
            per token, reward units; or a pair of that and the reward's metrics.
        hyperparams, config, advantage_estimator: as in `ppo_iteration`.

    Returns:
        (state, metrics), the state at the next iteration.

    Raises:
        ValueError: scores or advantages of a wrong shape; sizes that do not divide; truncated
            responses that shall be bootstrapped without a critic; two metrics of one name.
    """
    rollout, evaluation = collected.rollout, collected.evaluation
    scores, reported = _scores_and_metrics(scores, rollout)
    scores = shard_batch(upcast(scores))
    log_ratios = collected.old_logprobs - evaluation.reference_logprobs
    kl_coef = current_kl_coef(state, hyperparams)
    rewards = token_rewards(
        scores, log_ratios, rollout.mask, rollout.terminated,
        kl_coef=kl_coef, kl_estimator=None if config.kl_in_loss else config.kl_estimator,
        missing_eos_penalty=hyperparams.missing_eos_penalty, score_clip=hyperparams.score_clip,
    )  # fmt: skip
    if config.bootstrap_truncated and state.critic is None:
        raise ValueError("bootstrap_truncated takes the critic's value, but the critic is None.")
    advantages, returns = _estimate(
        rewards, rollout, evaluation, hyperparams, config, advantage_estimator
    )
    metrics = join(
        rollout_metrics(rollout, scores, log_ratios, evaluation.values, returns, rewards),
        prompt_counts(rollout, vocabulary_size(state.policy)),
        nonfinite_counts(rollout, collected.old_logprobs, evaluation, scores),
        {"kl_coef": kl_coef},
        reported,
    )
    experience = Experience(
        rollout=rollout, old_logprobs=collected.old_logprobs,
        reference_logprobs=evaluation.reference_logprobs, old_values=evaluation.values,
        advantages=advantages, returns=returns,
    )  # fmt: skip
    state, update_metrics = update(state, shard_batch(experience), hyperparams, config=config)
    state = adapt_kl_coef(
        state, hyperparams, kl_divergence=metrics["kl_divergence"],
        num_sequences=rollout.lengths.shape[0],
    )  # fmt: skip
    return state, join(metrics, update_metrics)


def _estimate(
    rewards: Float[Array, "B T"],
    rollout: Rollout,
    evaluation: Evaluation,
    hyperparams: Hyperparams,
    config: IterationConfig,
    advantage_estimator: AdvantageEstimator,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Stage 4: (advantages, returns)."""
    ended = rollout.terminated if config.bootstrap_truncated else jnp.ones_like(rollout.terminated)
    output = advantage_estimator(
        rewards, evaluation.values, rollout.mask,
        jnp.where(ended, 0.0, evaluation.bootstrap_values),
        gamma=hyperparams.gamma, lam=hyperparams.lam,
        groups=rollout.sample_ids // config.generation.samples_per_prompt,
    )  # fmt: skip
    advantages, returns = check_pair("advantage_estimator", "(advantages, returns)", output)
    check_shape("advantages of the estimator", advantages, rollout.tokens.shape)
    check_shape("returns of the estimator", returns, rollout.tokens.shape)
    return advantages, returns


def adapt_kl_coef(
    state: TrainState,
    hyperparams: Hyperparams,
    *,
    kl_divergence: Float[Array, ""],
    num_sequences: int,
) -> TrainState:
    """The state with the KL coefficient of its next iteration, by `adaptive_kl_coef`.

    Without a `kl_target` nothing changes.

    Args:
        state: after `update`; has the coefficient that was used.
        hyperparams: target and horizon of the controller.
        kl_divergence: nats per sequence, as `learn` reports it.
        num_sequences: in the batch.

    Returns:
        The same state with another `kl_coef`.
    """
    if hyperparams.kl_target is None:
        return state
    kl_coef = adaptive_kl_coef(
        state.kl_coef, kl_divergence, target=hyperparams.kl_target,
        horizon=hyperparams.kl_horizon, num_sequences=num_sequences,
    )  # fmt: skip
    return replace(state, kl_coef=kl_coef)


def ppo_iteration(
    state: TrainState,
    reference: Policy,
    prompts: Prompts,
    hyperparams: Hyperparams,
    *,
    reward: RewardFn,
    config: IterationConfig,
    advantage_estimator: AdvantageEstimator = whitened(gae),
) -> tuple[TrainState, Metrics]:
    """One whole PPO iteration, a pure function: jit it, vmap it, or call `compile_iteration`.

        prompts -> rollout -> evaluation -> token rewards -> advantages -> minibatch epochs -> state

    It is `learn(state, c, reward(c.rollout), ...)` with `c = collect(state, ...)`.

    Args:
        state: from `Learner.init` or the last iteration; its learner has optimizers and losses.
        reference: the frozen policy that the KL is measured against.
        prompts: N left-padded prompts with distinct sample ids.
        hyperparams: traced; a change never recompiles.
        reward: JAX-traceable; a Python reward goes between `collect` and `learn`.
        config: static settings.
        advantage_estimator: `whitened(gae)` or your own, which is taken as it is: see
            `functions.AdvantageEstimator` and `whitened`.

    Returns:
        (state, metrics), see the table in docs/metrics.md.

    Raises:
        ValueError: the reward cannot be traced or has a wrong shape; what `learn` raises.
    """
    collected = collect(state, reference, prompts, hyperparams, config=config)
    scores = _traced_scores(gather(reward), collected.rollout)
    return learn(
        state, collected, scores, hyperparams,
        config=config, advantage_estimator=advantage_estimator,
    )  # fmt: skip


def _scores_and_metrics(
    output: PyTree, rollout: Rollout
) -> tuple[Float[Array, " B"] | Float[Array, "B T"], Metrics]:
    """What a reward returned, apart, and its metrics reduced.

    Raises:
        ValueError: scores or metrics of a wrong shape.
    """
    scores, metrics = output, {}
    if isinstance(output, tuple):
        scores, metrics = check_pair("a reward", "scores or (scores, metrics)", output)
    check_shape(
        "the scores of a reward (one per sequence, or one per token)", scores,
        rollout.lengths.shape, rollout.tokens.shape,
    )  # fmt: skip
    return scores, reward_metrics(rollout, metrics)


def _traced_scores(reward: RewardFn, rollout: Rollout) -> PyTree:
    """What a reward inside the program returns.

    Raises:
        ValueError: it needs concrete values, or calls back to Python for a result.
    """
    remedy = (
        "so it cannot be part of the single program; call it between `collect` and `learn`, or "
        "give a PPOTrainer a PythonReward."
    )
    try:
        jaxpr, shape = jax.make_jaxpr(
            lambda rollout: jax.tree.map(_inexact, reward(rollout)), return_shape=True
        )(rollout)
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"reward {reward!r} needs concrete values (it runs Python on text or NumPy), {remedy}"
        ) from error
    if _calls_back(jaxpr.jaxpr):
        raise ValueError(f"reward {reward!r} calls back to Python, {remedy}")
    outputs = jax.extend.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(rollout))
    return jax.tree.unflatten(jax.tree.structure(shape), outputs)


def _inexact(x) -> Float[Array, "..."]:
    x = jnp.asarray(x)
    return x.astype(promote_types(x.dtype, jnp.float32))


def _calls_back(jaxpr: jax.extend.core.Jaxpr) -> bool:
    """Whether a program waits for Python. What `jax.debug` prints it does not wait for."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pure_callback", "io_callback"):
            return True
        if any(_calls_back(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)):
            return True
    return False
