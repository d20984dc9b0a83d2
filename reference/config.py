"""Settings of the stages."""

from collections.abc import Callable
from dataclasses import dataclass

from .ops.kl import k1
from .ops.masked import token_mean


@dataclass(frozen=True)
class Hyperparams:
    """Numbers; None switches a term off."""

    learning_rate_actor: float
    learning_rate_critic: float
    clip_ratio_low: float
    clip_ratio_high: float
    dual_clip: float | None
    value_clip: float | None
    gamma: float
    lam: float
    kl_coef: float
    kl_target: float | None
    kl_horizon: float
    entropy_coef: float
    value_coef: float
    temperature: float
    top_p: float | None
    min_p: float | None
    max_grad_norm_actor: float | None
    max_grad_norm_critic: float | None
    missing_eos_penalty: float
    score_clip: float | None


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of a rollout."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    min_new_tokens: int = 0
    top_k: int | None = None
    samples_per_prompt: int = 1


@dataclass(frozen=True)
class IterationConfig:
    """Settings of an iteration.

    `loss_kl_slope` is the derivative of `loss_kl`, the KL estimator in the loss. Epochs and
    minibatches are the rows of the order that an update is given.
    """

    generation: GenerationConfig
    reward_kl: Callable | None = k1
    loss_kl: Callable | None = None
    loss_kl_slope: Callable | None = None
    reduction: Callable = token_mean
    whiten_advantages: bool = True
    bootstrap_truncated: bool = False
    recompute_old_logprobs: bool = False
