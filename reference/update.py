"""Stage 5: every epoch's minibatches, with gradients derived by hand and Adam written out."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from .config import Hyperparams, IterationConfig
from .derivatives import entropy_slope, logprob_slope, policy_loss_slope, value_loss_slope
from .evaluation import full_sequence, response_logits, slot_values
from .losses import clipped_policy_loss, clipped_value_loss, is_clipped
from .models.heads import Model, critic_backward, policy_backward
from .ops.kl import is_clamped, k3
from .ops.logprobs import entropy, token_logprobs
from .ops.masked import masked_sum
from .tree import tree_leaves, tree_map
from .types import Experience

TERMS = ("actor_loss", "critic_loss", "entropy_bonus")
COUNTERS = ("clamped_log_ratios",)
COUNTS = ("tokens", "entropy", "approx_kl", "clip_fraction", *COUNTERS)

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
    """Gradients of one minibatch loss, its terms, and sums over its valid tokens."""

    policy: dict
    critic: dict
    terms: dict[str, float]
    counts: dict[str, float]


def update(
    state: TrainState,
    experience: Experience,
    order: Int[np.ndarray, "steps M"],
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
) -> tuple[TrainState, dict[str, float]]:
    """One optimizer step for every row of `order`, or none: see `_applied`."""
    taken = {"actor": [], "critic": []}
    for rows in order:
        gradients = minibatch_gradients(state, experience, rows, hyperparams, config=config)
        pair = global_norm(gradients.policy), global_norm(gradients.critic)
        sides = _applied(gradients, pair, state, experience, rows)
        state = _step(state, gradients, pair, sides, hyperparams)
        for side in sides:
            taken[side].append((gradients, pair))
    actor, critic = taken["actor"], taken["critic"]
    terms = [{k: x for k, x in g.terms.items() if k != "critic_loss"} for g, _ in actor]
    metrics = _means(terms, len(actor))
    metrics |= _means([{"critic_loss": g.terms["critic_loss"]} for g, _ in critic], len(critic))
    metrics |= _means([{"grad_norm_actor": pair[0]} for _, pair in actor], len(actor))
    metrics |= _means([{"grad_norm_critic": pair[1]} for _, pair in critic], len(critic))
    totals = _means([g.counts for g, _ in actor], 1)
    tokens = totals.pop("tokens", 1)
    metrics |= {name: x if name in COUNTERS else x / tokens for name, x in totals.items()}
    return state, metrics | {"skipped_minibatches": float(len(order) - len(critic))}


def _applied(
    gradients: MinibatchGradients,
    norms: tuple[float, float],
    state: TrainState,
    experience: Experience,
    rows: Int[np.ndarray, " M"],
) -> tuple[str, ...]:
    """Which models step: none without a token or with a target or gradient that is not finite.

    A separate critic comes after the policy, so where its gradient alone is spoilt, the policy has
    stepped.
    """
    mask = experience.rollout.mask[rows]
    targets = experience.returns[rows][mask], experience.old_values[rows][mask]
    ready = gradients.counts["tokens"] > 0 and all(np.isfinite(x).all() for x in targets)
    actor, critic = ready and np.isfinite(norms[0]), ready and np.isfinite(norms).all()
    if critic:
        return "actor", "critic"
    return ("actor",) if actor and state.critic.config is not None else ()


def _means(numbers: list[dict[str, float]], count: int) -> dict[str, float]:
    """The sum of each entry over `count`; nothing where there is no step."""
    names = numbers[0] if numbers else ()
    return {name: sum(x[name] for x in numbers) / count for name in names}


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
    terms, counts = dict.fromkeys(TERMS, 0.0), dict.fromkeys(COUNTS, 0.0)
    if config.loss_kl is not None:
        terms["kl_loss"] = 0.0
    for b, weight in zip(rows.tolist(), weights, strict=True):
        place = full_sequence(experience.rollout, b)
        logits = response_logits(state.policy, experience.rollout, b, hyperparams.temperature)
        dlogits = _logit_gradient(state, experience, b, weight, logits, hyperparams, config)
        dvalues, critic_loss = _value_gradient(state, experience, b, weight, hyperparams)
        terms["critic_loss"] += critic_loss
        _count(terms, counts, experience, b, weight, logits, hyperparams, config)
        critic_part, dhidden = critic_backward(dvalues, critic, policy, *place)
        policy_part = policy_backward(dhidden, dlogits, policy, *place)
        totals = [
            tree_map(np.add, total, part)
            for total, part in zip(totals, (policy_part, critic_part), strict=True)
        ]
    return MinibatchGradients(*totals, terms, counts)


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
        if config.loss_kl is not None:
            terms["kl_loss"] += weight[t] * config.loss_kl(log_ratios[t : t + 1])[0]
        counts["tokens"] += 1
        counts["entropy"] += entropies[t]
        counts["approx_kl"] += behind[t]
        counts["clip_fraction"] += clipped[t]
        counts["clamped_log_ratios"] += clamped[t]


def _clips(hyperparams: Hyperparams) -> dict[str, float]:
    return {name: getattr(hyperparams, name) for name in ("clip_ratio_low", "clip_ratio_high")}


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
        if config.loss_kl_slope is not None:
            log_ratio = logprobs[t] - experience.reference_logprobs[b, t]
            slope += state.kl_coef * config.loss_kl_slope(log_ratio)
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


def global_norm(tree) -> float:
    """Euclidean norm of all the numbers of a tree."""
    return float(np.sqrt(sum((leaf**2).sum() for leaf in tree_leaves(tree))))


def _step(
    state: TrainState,
    gradients: MinibatchGradients,
    norms: tuple[float, float],
    sides: tuple[str, ...],
    hyperparams: Hyperparams,
) -> TrainState:
    parts = {
        "actor": ("policy", gradients.policy, norms[0]),
        "critic": ("critic", gradients.critic, norms[1]),
    }
    for side in sides:
        name, gradient, norm = parts[side]
        model, moments = _adam(
            getattr(state, name), getattr(state, f"{side}_moments"), gradient, norm,
            getattr(hyperparams, f"max_grad_norm_{side}"),
            getattr(hyperparams, f"learning_rate_{side}"),
        )  # fmt: skip
        state = replace(state, **{name: model, f"{side}_moments": moments})
    return state


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
