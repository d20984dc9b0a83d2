"""PPO formulas as TRL, verl and OpenRLHF compute them, restated in NumPy from their sources.

    TRL       huggingface/trl 1.12.0, the last release with PPO:
              trl/experimental/ppo/ppo_trainer.py (masked_*, and PPOTrainer.train)
    verl      verl-project/verl 0.9.1: verl/trainer/ppo/core_algos.py and ray_trainer.py,
              verl/utils/torch_functional.py
    OpenRLHF  OpenRLHF/OpenRLHF 0.11.2: openrlhf/models/loss.py and utils.py,
              openrlhf/trainer/ppo_utils/experience_maker.py and kl_controller.py
    Tunix     google/tunix c7d8950: tunix/rl/ppo/ppo_learner.py

Arrays are [B, T]; `mask` says which slots hold a response token. Each docstring names its source.
"""

import numpy as np


def exponential(x, limit=np.inf):
    with np.errstate(over="ignore"):
        return np.exp(np.clip(x, -limit, limit))


# Whitening


def whiten_unbiased(x, mask):
    """TRL and verl, `masked_whiten`: all tokens of a rank, variance with divisor n - 1."""
    n = mask.sum()
    mean = x[mask].sum() / n
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = ((x[mask] - mean) ** 2).sum() / (n - 1)
    return (x - mean) / np.sqrt(variance + 1e-8)


def whiten_floored(x, mask):
    """OpenRLHF, end of `compute_advantages_and_returns`: divisor n, variance of at least 1e-8."""
    mean = x[mask].mean()
    return (x - mean) / np.sqrt(max(x[mask].var(), 1e-8))


# KL estimates; x = log policy - log reference


def k3_unbounded(x):
    """TRL, step 4 of `PPOTrainer.train`, kl_estimator "k3"."""
    return exponential(-x) - 1 + x


def k3_verl(x):
    """verl, `kl_penalty_forward`, "low_var_kl": exponent within 20, result at most 10."""
    x = np.clip(x, -20, 20)
    return np.minimum(exponential(-x) - 1 + x, 10)


def k1_openrlhf(x):
    """OpenRLHF, `compute_approx_kl`, "k1": within 10."""
    return np.clip(x, -10, 10)


def k2_openrlhf(x):
    """OpenRLHF, `compute_approx_kl`, "k2": at most 10."""
    return np.minimum(x**2 / 2, 10)


def k3_openrlhf(x):
    """OpenRLHF, `compute_approx_kl`, "k3": exponent and result at most 10."""
    x = np.maximum(x, -10)
    return np.minimum(exponential(-x) - 1 + x, 10)


def next_kl_coef(coef, kl, target, horizon, count):
    """verl and OpenRLHF, `AdaptiveKLController.update`."""
    return coef * (1 + np.clip(kl / target - 1, -0.2, 0.2) * count / horizon)


# Rewards


def rewards_trl(scores, log_ratios, lengths, terminated, kl_coef, missing_eos_penalty):
    """TRL, steps 3 and 4 of `PPOTrainer.train` (k1).

    `lengths` counts the EOS. The score goes to slot `lengths`, one past the last token, where
    there is such a slot, and to the last slot otherwise.
    """
    rows, width = log_ratios.shape
    valid = np.arange(width) < lengths[:, None]
    rewards = np.where(valid, -kl_coef * log_ratios, 0.0)
    scores = scores - np.where(terminated, 0.0, missing_eos_penalty)
    rewards[np.arange(rows), np.minimum(lengths, width - 1)] += scores
    return rewards


def rewards_verl(token_scores, log_ratios, mask, kl_coef):
    """verl, `apply_kl_penalty`: a score a token, less the penalty on response tokens."""
    return token_scores - kl_coef * log_ratios * mask


def rewards_openrlhf(scores, log_ratios, mask, kl_coef, bound):
    """OpenRLHF, `compute_reward`: the clipped score at the last valid slot, or at the last slot."""
    rewards = -max(kl_coef, 0.0) * log_ratios
    for row, valid, score in zip(rewards, mask, np.clip(scores, -bound, bound), strict=True):
        row[np.flatnonzero(valid)[-1] if valid.any() else -1] += score
    return rewards


def rewards_tunix(scores, tokens, last):
    """Tunix, `PPOLearner`: the score is added to a buffer with the type of the token ids."""
    rewards = np.zeros_like(tokens)
    rewards[np.arange(len(tokens)), last] += scores.astype(tokens.dtype)
    return rewards


# Advantages: (advantages, returns) before whitening


def gae_slots(rewards, values, gamma, lam):
    """TRL, step 6 of `PPOTrainer.train`: slot after slot, whatever the mask; 0 after the last."""
    advantages = np.zeros_like(rewards)
    following, later = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * later
        advantages[:, t], following = later, values[:, t]
    return advantages, advantages + values


def gae_trl(rewards, values, lengths, gamma, lam):
    """TRL, steps 3 and 6: values are 0 beyond slot `lengths`, so the one past EOS counts."""
    seen = np.arange(values.shape[1]) <= lengths[:, None]
    return gae_slots(rewards, np.where(seen, values, 0.0), gamma, lam)


def gae_openrlhf(rewards, values, mask, gamma, lam):
    """OpenRLHF, `get_advantages_and_returns`: 0 outside the mask, then slot after slot."""
    return gae_slots(rewards * mask, values * mask, gamma, lam)


def gae_verl(rewards, values, mask, gamma, lam):
    """verl, `compute_gae_advantage_return`: outside the mask both carries are kept."""
    advantages = np.zeros_like(rewards)
    following, later = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * later
        later = np.where(mask[:, t], here, later)
        following = np.where(mask[:, t], values[:, t], following)
        advantages[:, t] = later
    return advantages, advantages + values


# Losses a token


def policy_loss(log_ratio, advantages, low, high, *, dual_clip=None, limit=20.0):
    """verl, `compute_policy_loss_vanilla` and OpenRLHF, `PolicyLoss`: log-ratio within 20.

    With `limit=np.inf`, one clip and no dual clip it is TRL's, in `PPOTrainer.train`.
    """
    ratio = exponential(log_ratio, limit)
    gain = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual_clip is not None:
        gain = np.where(advantages < 0, np.maximum(gain, dual_clip * advantages), gain)
    return -gain


def value_loss(values, old_values, returns, clip):
    """TRL (`PPOTrainer.train`), verl (`compute_value_loss`), OpenRLHF (`ValueLoss`), a token."""
    near = np.clip(values, old_values - clip, old_values + clip)
    return np.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


# Reductions of a loss to a number


def mean_of_tokens(loss, mask):
    """TRL `masked_mean`; verl `agg_loss`, "token-mean"; OpenRLHF `aggregate_loss`, token level."""
    with np.errstate(invalid="ignore"):
        return loss[mask].sum() / np.float64(mask.sum())


def mean_of_sequences(loss, mask):
    """verl `agg_loss`, "seq-mean-token-mean"; OpenRLHF `aggregate_loss`, not token level."""
    totals, counts = (loss * mask).sum(1), mask.sum(1)
    return (totals / (counts + 1e-8)).sum() / (counts > 0).sum()


def mean_of_sums(loss, mask, divisor):
    """verl `agg_loss`: "seq-mean-token-sum" (divisor 1), "seq-mean-token-sum-norm" (divisor T)."""
    return (loss * mask).sum() / (mask.any(1)).sum() / divisor
