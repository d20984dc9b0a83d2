"""Stage 5: every epoch's minibatches."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int

from ..config import Hyperparams, IterationConfig
from ..types import Experience
from .gradient import COUNTERS, MinibatchGradients, minibatch_gradients
from .optimizer import global_norm, optimizer_step
from .state import TrainState


def update(
    state: TrainState,
    experience: Experience,
    order: Int[np.ndarray, "steps M"],
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
) -> tuple[TrainState, dict[str, float]]:
    """One optimizer step for every row of `order`, or none: see `_applied`."""
    actor, critic, first = [], [], {"log_ratio": 0.0, "tokens": 1}
    for number, rows in enumerate(order):
        gradients = minibatch_gradients(state, experience, rows, hyperparams, config=config)
        norms = global_norm(gradients.policy), global_norm(gradients.critic)
        steps = _applied(gradients, norms, state, experience, rows)
        if number == 0 and steps[0]:
            first = gradients.counts
        if steps[0]:
            actor.append((gradients, norms[0]))
            model, moments = optimizer_step(
                state.policy, state.actor_moments, gradients.policy, norms[0], hyperparams.actor
            )
            state = replace(state, policy=model, actor_moments=moments)
        if steps[1]:
            critic.append((gradients, norms[1]))
            model, moments = optimizer_step(
                state.critic, state.critic_moments, gradients.critic, norms[1], hyperparams.critic
            )
            state = replace(state, critic=model, critic_moments=moments)
    metrics = _metrics(actor, critic, has_critic=state.critic is not None)
    metrics["initial_log_ratio"] = first["log_ratio"] / first["tokens"]
    metrics["skipped_minibatches"] = float(
        len(order) - len(actor if state.critic is None else critic)
    )
    return replace(state, iteration=state.iteration + 1), metrics


def _metrics(actor: list, critic: list, *, has_critic: bool) -> dict[str, float]:
    """Means over the steps of each model, of (gradients, norm), or over their tokens."""
    metrics = _means([g.terms["policy"] | {"grad_norm_actor": norm} for g, norm in actor])
    if has_critic:
        metrics |= _means([g.terms["critic"] | {"grad_norm_critic": norm} for g, norm in critic])
    totals = {}
    for gradients, _ in actor:
        totals = {k: totals.get(k, 0.0) + x for k, x in gradients.counts.items()}
    tokens, _ = totals.pop("tokens", 1), totals.pop("log_ratio", 0.0)
    return metrics | {k: x if k in COUNTERS else x / tokens for k, x in totals.items()}


def _applied(
    gradients: MinibatchGradients,
    norms: tuple[float, float],
    state: TrainState,
    experience: Experience,
    rows: Int[np.ndarray, " M"],
) -> tuple[bool, bool]:
    """Whether (policy, critic) step.

    Neither does without a token, or with a target or gradient that is not finite.

    A separate critic comes after the policy, so where its gradient alone is spoilt, the policy has
    stepped.
    """
    mask = experience.rollout.mask[rows]
    targets = experience.returns[rows][mask], experience.old_values[rows][mask]
    ready = gradients.counts["tokens"] > 0 and all(np.isfinite(x).all() for x in targets)
    if not (ready and np.isfinite(norms[0])):
        return False, False
    if state.critic is None:
        return True, False
    critic = bool(np.isfinite(norms[1]))
    return critic or state.critic.config is not None, critic


def _means(numbers: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry; nothing where there is no step."""
    names = numbers[0] if numbers else ()
    return {name: sum(x[name] for x in numbers) / len(numbers) for name in names}
