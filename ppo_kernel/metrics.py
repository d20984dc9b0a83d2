"""What an iteration reports of its rollout. What it reports of the update: `learner/reports.py`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from .ops.checks import check_shape
from .ops.kl import is_clamped
from .ops.masked import masked_mean, masked_sum
from .rewards import last_valid
from .types import Evaluation, Metrics, Rollout


def rollout_metrics(
    rollout: Rollout,
    scores: Float[Array, " B"] | Float[Array, "B T"],
    log_ratios: Float[Array, "B T"],
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    rewards: Float[Array, "B T"],
) -> Metrics:
    """What the rollout says of the policy; sequences without a token are counted, not averaged.

    Args:
        rollout: B sequences.
        scores: one per sequence or one per token, reward units.
        log_ratios: log policy / reference of each token, nats.
        values, returns, rewards: before the update, reward units.

    Returns:
        The metrics of docs/metrics.md that do not come from the update.
    """
    mask, kept = rollout.mask, jnp.any(rollout.mask, axis=1)
    totals = scores if scores.ndim == 1 else jnp.sum(jnp.where(mask, scores, 0.0), axis=1)
    mean = masked_mean(totals, kept)
    sequences = jnp.maximum(jnp.sum(kept), 1).astype(log_ratios.dtype)
    residual = jnp.where(mask, returns - values, 0.0)

    def variance(x: Float[Array, "B T"]) -> Float[Array, ""]:
        return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)

    spread = variance(returns)
    explained = 1.0 - variance(residual) / jnp.where(spread > 0, spread, 1.0)
    float_type = totals.dtype
    return {
        "mean_reward": mean,
        "reward_std": jnp.sqrt(masked_mean(jnp.square(totals - mean), kept)),
        "token_reward": masked_sum(rewards, mask) / sequences.astype(rewards.dtype),
        "kl_divergence": masked_sum(log_ratios, mask) / sequences,
        "explained_variance": jnp.where(spread > 0, explained, 0.0),
        "value_mean": masked_mean(values, mask),
        "return_mean": masked_mean(returns, mask),
        "response_length": jnp.mean(rollout.lengths.astype(float_type)),
        "truncated_fraction": jnp.mean((~rollout.terminated).astype(float_type)),
        "empty_prompts": jnp.sum(~jnp.any(rollout.prompt_mask, axis=1)).astype(float_type),
        "empty_responses": jnp.sum(~kept).astype(float_type),
        "clamped_rollout_log_ratios": masked_sum(is_clamped(log_ratios).astype(float_type), mask),
    }


def prompt_counts(rollout: Rollout, vocab_size: int) -> Metrics:
    """Faults of the prompts that no result shows; `check_prompts` refuses those it can see.

    Args:
        rollout: B sequences.
        vocab_size: V of the policy.

    Returns:
        Sequences whose prompt is not left-padded, prompt ids outside [0, V), and sequences whose
        sample id another one has too.
    """
    tokens, mask = rollout.prompt_tokens, rollout.prompt_mask
    ids = jnp.sort(rollout.sample_ids)
    counts = {
        "misplaced_prompts": jnp.any(mask[:, :-1] & ~mask[:, 1:], axis=1),
        "out_of_vocabulary_ids": mask & ((tokens < 0) | (tokens >= vocab_size)),
        "duplicate_sample_ids": ids[1:] == ids[:-1],
    }
    return {name: jnp.sum(x).astype(rollout.logprobs.dtype) for name, x in counts.items()}


def nonfinite_counts(
    rollout: Rollout,
    old_logprobs: Float[Array, "B T"],
    evaluation: Evaluation,
    scores: Float[Array, " B"] | Float[Array, "B T"],
) -> Metrics:
    """How many valid tokens meet a NaN or an infinity: what poisons a metric, skips a minibatch.

    Args:
        rollout, old_logprobs, evaluation: as in `Experience` and `Evaluation`.
        scores: one per sequence, counted where they land, or one per token.

    Returns:
        The `nonfinite_` counters of docs/metrics.md.
    """
    logprobs = (rollout.behaviour_logprobs, old_logprobs, evaluation.reference_logprobs)
    scored = rollout.mask
    if scores.ndim == 1:
        scores, scored = scores[:, None], last_valid(rollout.mask)
    values = evaluation.values + evaluation.bootstrap_values[:, None]
    bad = {
        "nonfinite_scores": ~jnp.isfinite(scores) & scored,
        "nonfinite_logprobs": ~jnp.all(jnp.isfinite(jnp.stack(logprobs)), axis=0),
        "nonfinite_values": ~jnp.isfinite(values),
    }
    return {
        name: masked_sum(x.astype(jnp.result_type(float)), rollout.mask) for name, x in bad.items()
    }


def reward_metrics(rollout: Rollout, metrics: dict[str, Real[Array, " B"]]) -> Metrics:
    """Means of what a reward reports, over the sequences that have a token.

    Args:
        rollout: B sequences.
        metrics: name -> a number per sequence.

    Returns:
        Name -> mean.

    Raises:
        ValueError: a metric is no number per sequence.
    """
    kept = jnp.any(rollout.mask, axis=1)
    for name, values in metrics.items():
        check_shape(f"{name!r}, a metric of the reward,", values, kept.shape)
    float_type = jnp.result_type(float)
    return {name: masked_mean(x.astype(float_type), kept) for name, x in metrics.items()}
