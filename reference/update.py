"""Stage 5: every epoch's minibatches, with gradients derived by hand and Adam written out."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from .config import Hyperparams, IterationConfig
from .derivatives import entropy_slope, logprob_slope, policy_loss_slope, value_loss_slope
from .losses import clipped_policy_loss, clipped_value_loss
from .models.heads import Model, critic_backward, policy_backward
from .ops.logprobs import token_logprobs
from .ops.masked import masked_sum
from .scoring import full_sequence, response_logits, slot_values
from .tree import tree_leaves, tree_map
from .types import Experience

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Moments:
    """Adam's memory: steps taken, running means of gradients and of their squares."""

    count: int
    first: dict
    second: dict

    @classmethod
    def zero(cls, parameters: dict) -> "Moments":
        """Before the first step."""
        return cls(0, tree_map(np.zeros_like, parameters), tree_map(np.zeros_like, parameters))


@dataclass(frozen=True)
class TrainState:
    """What an iteration changes."""

    policy: Model
    critic: Model
    actor_moments: Moments
    critic_moments: Moments
    kl_coef: float

    @classmethod
    def start(cls, policy: Model, critic: Model, kl_coef: float) -> "TrainState":
        """Before the first iteration."""
        moments = (Moments.zero(policy.parameters), Moments.zero(critic.parameters))
        return cls(policy, critic, *moments, kl_coef)


class MinibatchGradients(NamedTuple):
    """Gradients of one minibatch loss, and two of its terms."""

    policy: dict
    critic: dict
    actor_loss: float
    critic_loss: float


def update(
    state: TrainState,
    experience: Experience,
    order: Int[np.ndarray, "steps M"],
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
) -> tuple[TrainState, dict[str, float]]:
    """One optimizer step for every row of `order`; one without a token, or with a gradient that
    is not finite, is left out."""
    applied = []
    for rows in order:
        gradients = minibatch_gradients(state, experience, rows, hyperparams, config=config)
        norms = global_norm(gradients.policy), global_norm(gradients.critic)
        if np.isfinite(norms).all() and experience.rollout.mask[rows].any():
            state = _step(state, gradients, norms, hyperparams)
            applied.append((gradients.actor_loss, gradients.critic_loss, *norms))
    means = np.mean(applied, axis=0) if applied else np.zeros(4)
    names = ("actor_loss", "critic_loss", "grad_norm_actor", "grad_norm_critic")
    metrics = {name: float(mean) for name, mean in zip(names, means, strict=True)}
    return state, metrics | {"skipped_minibatches": float(len(order) - len(applied))}


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
    totals = [tree_map(np.zeros_like, model.parameters) for model in (policy, critic)]
    losses = [0.0, 0.0]
    for b, weight in zip(rows.tolist(), weights, strict=True):
        place = full_sequence(experience.rollout, b)
        dlogits, actor_loss = _logit_gradient(state, experience, b, weight, hyperparams, config)
        dvalues, critic_loss = _value_gradient(state, experience, b, weight, hyperparams)
        critic_part, dhidden = critic_backward(dvalues, critic, policy, *place)
        policy_part = policy_backward(dhidden, dlogits, policy, *place)
        totals = [
            tree_map(np.add, total, part)
            for total, part in zip(totals, (policy_part, critic_part), strict=True)
        ]
        losses = [losses[0] + actor_loss, losses[1] + critic_loss]
    return MinibatchGradients(*totals, *losses)


def _logit_gradient(
    state: TrainState,
    experience: Experience,
    b: int,
    weight: Float64[np.ndarray, " T"],
    hyperparams: Hyperparams,
    config: IterationConfig,
) -> tuple[Float64[np.ndarray, "S V"], float]:
    """(gradient of the logits of sequence b, its weighted policy loss).

    dL = w (dpolicy/dlogp + kl_coef dkl/dlogp) dlogp - w entropy_coef dH,  z = logits / temperature
    """
    rollout, start = experience.rollout, experience.rollout.prompt_tokens.shape[1] - 1
    tempered = response_logits(state.policy, rollout, b, hyperparams.temperature)
    logprobs = token_logprobs(tempered, rollout.tokens[b])
    old, advantages = experience.old_logprobs[b], experience.advantages[b]
    clips = {
        name: getattr(hyperparams, name)
        for name in ("clip_ratio_low", "clip_ratio_high", "dual_clip")
    }
    losses = clipped_policy_loss(logprobs, old, advantages, **clips)
    gradient = np.zeros((start + 1 + len(tempered), tempered.shape[1]))
    for t in np.flatnonzero(rollout.mask[b]):
        slope = policy_loss_slope(logprobs[t], old[t], advantages[t], **clips)
        if config.loss_kl_slope is not None:
            log_ratio = logprobs[t] - experience.reference_logprobs[b, t]
            slope += state.kl_coef * config.loss_kl_slope(log_ratio)
        probabilities = np.exp(tempered[t] - tempered[t].max())
        probabilities /= probabilities.sum()
        towards = slope * logprob_slope(probabilities, int(rollout.tokens[b, t]))
        towards -= hyperparams.entropy_coef * entropy_slope(probabilities)
        gradient[start + t] = weight[t] * towards / hyperparams.temperature
    return gradient, masked_sum(weight * losses, rollout.mask[b])


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


def global_norm(tree) -> float:
    """Euclidean norm of all the numbers of a tree."""
    return float(np.sqrt(sum((leaf**2).sum() for leaf in tree_leaves(tree))))


def _step(
    state: TrainState,
    gradients: MinibatchGradients,
    norms: tuple[float, float],
    hyperparams: Hyperparams,
) -> TrainState:
    policy, actor_moments = _adam(
        state.policy, state.actor_moments, gradients.policy, norms[0],
        hyperparams.max_grad_norm_actor, hyperparams.learning_rate_actor,
    )  # fmt: skip
    critic, critic_moments = _adam(
        state.critic, state.critic_moments, gradients.critic, norms[1],
        hyperparams.max_grad_norm_critic, hyperparams.learning_rate_critic,
    )  # fmt: skip
    return TrainState(policy, critic, actor_moments, critic_moments, state.kl_coef)


def _adam(
    model: Model, moments: Moments, gradient: dict, norm: float, limit: float | None, rate: float
) -> tuple[Model, Moments]:
    """m = .9 m + .1 g,  v = .999 v + .001 g^2,  x -= rate * m' / (sqrt(v') + 1e-8).

    m' = m / (1 - .9^n) and v' = v / (1 - .999^n) take out the start at zero (Kingma & Ba 2015).
    """
    if limit is not None and norm > limit:
        gradient = tree_map(lambda g: g * limit / norm, gradient)
    count = moments.count + 1
    first = tree_map(lambda m, g: FIRST_DECAY * m + (1 - FIRST_DECAY) * g, moments.first, gradient)
    second = tree_map(
        lambda v, g: SECOND_DECAY * v + (1 - SECOND_DECAY) * g**2, moments.second, gradient
    )

    def move(x: np.ndarray, m: np.ndarray, v: np.ndarray) -> np.ndarray:
        mean, square = m / (1 - FIRST_DECAY**count), v / (1 - SECOND_DECAY**count)
        return x - rate * mean / (np.sqrt(square) + EPSILON)

    parameters = tree_map(move, model.parameters, first, second)
    return replace(model, parameters=parameters), Moments(count, first, second)
