"""What an iteration reports of its rollout, from the valid tokens of each sequence in turn."""

import numpy as np
from jaxtyping import Float64

from .ops.kl import is_clamped
from .types import Rollout


def rollout_metrics(
    rollout: Rollout,
    scores: Float64[np.ndarray, "..."],
    log_ratios: Float64[np.ndarray, "B T"],
    values: Float64[np.ndarray, "B T"],
    returns: Float64[np.ndarray, "B T"],
    rewards: Float64[np.ndarray, "B T"],
) -> dict[str, float]:
    """Means over the sequences that have a token, and over those tokens."""
    kept = [b for b in range(len(rollout.mask)) if rollout.mask[b].any()]
    places = [(b, t) for b in kept for t in np.flatnonzero(rollout.mask[b])]
    totals = [scores[b] if scores.ndim == 1 else scores[b][rollout.mask[b]].sum() for b in kept]
    target = [returns[place] for place in places]
    residual = [returns[place] - values[place] for place in places]
    return {
        "mean_reward": _mean(totals),
        "reward_std": _variance(totals) ** 0.5,
        "token_reward": _mean([rewards[b][rollout.mask[b]].sum() for b in kept]),
        "kl_divergence": _mean([log_ratios[b][rollout.mask[b]].sum() for b in kept]),
        "explained_variance": 1 - _variance(residual) / _variance(target)
        if _variance(target) > 0
        else 0.0,
        "value_mean": _mean([values[place] for place in places]),
        "return_mean": _mean(target),
        "response_length": float(np.mean(rollout.lengths)),
        "truncated_fraction": float(np.mean(~rollout.terminated)),
        "empty_prompts": float(sum(not row.any() for row in rollout.prompt_mask)),
        "empty_responses": float(len(rollout.mask) - len(kept)),
        "clamped_rollout_log_ratios": float(
            sum(is_clamped(log_ratios[b : b + 1, t])[0] for b, t in places)
        ),
    }


def _mean(numbers: list[float]) -> float:
    return float(sum(numbers) / len(numbers)) if numbers else 0.0


def _variance(numbers: list[float]) -> float:
    centre = _mean(numbers)
    return _mean([(x - centre) ** 2 for x in numbers])
