"""Gradients of one minibatch, derived by hand, one sequence at a time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from ..config import Hyperparams, IterationConfig
from ..derivatives import entropy_slope, logprob_slope, policy_loss_slope, value_loss_slope
from ..evaluation import full_sequence, response_logits, slot_values
from ..losses import clipped_policy_loss, clipped_value_loss, is_clipped
from ..models.heads import critic_backward, policy_backward
from ..ops.kl import is_clamped, k3
from ..ops.logprobs import entropy, token_logprobs
from ..ops.masked import masked_sum
from ..tree import tree_map
from ..types import Experience
from .state import TrainState

COUNTERS = ("clamped_log_ratios",)
COUNTS = ("tokens", "entropy", "approx_kl", "clip_fraction", "log_ratio", *COUNTERS)


class MinibatchGradients(NamedTuple):
    """Gradients of one minibatch loss, the terms of each model, and sums over its valid tokens."""

    policy: dict
    critic: dict
    terms: dict[str, dict[str, float]]
    counts: dict[str, float]


def minibatch_gradients(
    state: TrainState,
    experience: Experience,
    rows: Int[np.ndarray, " M"],
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
) -> MinibatchGradients:
    """The weights are those of the whole minibatch, then each sequence adds its share."""
    policy, critic = state.policy, state.critic
    weights = config.reduction(experience.rollout.mask[rows])
    policy_total = tree_map(np.zeros_like, policy.parameters)
    critic_total = {} if critic is None else tree_map(np.zeros_like, critic.parameters)
    actor_terms = dict.fromkeys(("actor_loss", "entropy_bonus"), 0.0)
    if config.kl_in_loss and config.kl_estimator is not None:
        actor_terms["kl_loss"] = 0.0
    counts, critic_loss = dict.fromkeys(COUNTS, 0.0), 0.0
    for b, weight in zip(rows.tolist(), weights, strict=True):
        place = full_sequence(experience.rollout, b)
        logits = response_logits(policy, experience.rollout, b, hyperparams.temperature)
        dlogits = _logit_gradient(state, experience, b, weight, logits, hyperparams, config)
        _count(actor_terms, counts, experience, b, weight, logits, hyperparams, config)
        dhidden = np.zeros((len(place[0]), len(policy.parameters["norm"])))
        if critic is not None:
            dvalues, loss = _value_gradient(state, experience, b, weight, hyperparams)
            critic_loss += loss
            part, dhidden = critic_backward(dvalues, critic, policy, *place)
            critic_total = tree_map(np.add, critic_total, part)
        part = policy_backward(dhidden, dlogits, policy, *place)
        policy_total = tree_map(np.add, policy_total, part)
    terms = {"policy": actor_terms, "critic": {"critic_loss": critic_loss}}
    return MinibatchGradients(policy_total, critic_total, terms, counts)


def _count(
    terms: dict[str, float],
    counts: dict[str, float],
    experience: Experience,
    b: int,
    weight: Float64[np.ndarray, " T"],
    logits: Float64[np.ndarray, "T V"],
    hyperparams: Hyperparams,
    config: IterationConfig,
) -> None:
    """Add what the valid tokens of sequence b say to the terms of the loss and the counts."""
    rollout, clips = experience.rollout, _clips(hyperparams)
    logprobs, entropies = token_logprobs(logits, rollout.tokens[b]), entropy(logits)
    old, advantages = experience.old_logprobs[b], experience.advantages[b]
    losses = clipped_policy_loss(
        logprobs, old, advantages, **clips, dual_clip=hyperparams.dual_clip
    )
    clipped = is_clipped(logprobs, old, advantages, **clips)
    steps, log_ratios = logprobs - old, logprobs - experience.reference_logprobs[b]
    clamped, behind = is_clamped(steps) | is_clamped(log_ratios), k3(-steps)
    for t in np.flatnonzero(rollout.mask[b]):
        terms["actor_loss"] += weight[t] * losses[t]
        terms["entropy_bonus"] += weight[t] * entropies[t]
        if "kl_loss" in terms:
            terms["kl_loss"] += weight[t] * config.kl_estimator(log_ratios[t : t + 1])[0]
        counts["tokens"] += 1
        counts["entropy"] += entropies[t]
        counts["approx_kl"] += behind[t]
        counts["clip_fraction"] += clipped[t]
        counts["log_ratio"] += abs(steps[t])
        counts["clamped_log_ratios"] += clamped[t]


def _clips(hyperparams: Hyperparams) -> dict[str, float]:
    return {
        "clip_ratio_low": hyperparams.clip_ratio_low, "clip_ratio_high": hyperparams.clip_ratio_high
    }  # fmt: skip


def _logit_gradient(
    state: TrainState,
    experience: Experience,
    b: int,
    weight: Float64[np.ndarray, " T"],
    tempered: Float64[np.ndarray, "T V"],
    hyperparams: Hyperparams,
    config: IterationConfig,
) -> Float64[np.ndarray, "S V"]:
    """Gradient of the logits of sequence b; `tempered` are those of its response.

    dL = w (dpolicy/dlogp + kl_coef dkl/dlogp) dlogp - w entropy_coef dH,  z = logits / temperature
    """
    rollout, start = experience.rollout, experience.rollout.prompt_tokens.shape[1] - 1
    logprobs = token_logprobs(tempered, rollout.tokens[b])
    old, advantages = experience.old_logprobs[b], experience.advantages[b]
    clips = _clips(hyperparams) | {"dual_clip": hyperparams.dual_clip}
    gradient = np.zeros((start + 1 + len(tempered), tempered.shape[1]))
    for t in np.flatnonzero(rollout.mask[b]):
        slope = policy_loss_slope(logprobs[t], old[t], advantages[t], **clips)
        if config.kl_in_loss and config.kl_slope is not None:
            log_ratio = logprobs[t] - experience.reference_logprobs[b, t]
            slope += state.kl_coef * config.kl_slope(log_ratio)
        probabilities = np.exp(tempered[t] - tempered[t].max())
        probabilities /= probabilities.sum()
        towards = slope * logprob_slope(probabilities, int(rollout.tokens[b, t]))
        towards -= hyperparams.entropy_coef * entropy_slope(probabilities)
        gradient[start + t] = weight[t] * towards / hyperparams.temperature
    return gradient


def _value_gradient(
    state: TrainState,
    experience: Experience,
    b: int,
    weight: Float64[np.ndarray, " T"],
    hyperparams: Hyperparams,
) -> tuple[Float64[np.ndarray, " S"], float]:
    """(gradient of the values of every slot of sequence b, its weighted value loss)."""
    rollout, start = experience.rollout, experience.rollout.prompt_tokens.shape[1] - 1
    every_slot = slot_values(state.critic, state.policy, rollout, b)
    values, gradient = every_slot[start:-1], np.zeros_like(every_slot)
    old, targets, clip = experience.old_values[b], experience.returns[b], hyperparams.value_clip
    losses = clipped_value_loss(values, old, targets, value_clip=clip)
    for t in np.flatnonzero(rollout.mask[b]):
        slope = value_loss_slope(values[t], old[t], targets[t], value_clip=clip)
        gradient[start + t] = hyperparams.value_coef * weight[t] * slope
    return gradient, masked_sum(weight * losses, rollout.mask[b])
