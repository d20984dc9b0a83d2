"""Settings of the stages."""

from collections.abc import Callable
from dataclasses import dataclass

from .losses import token_mean
from .ops.kl import k1


@dataclass(frozen=True)
class OptimizerHyperparams:
    """How far one model steps."""

    learning_rate: float
    max_grad_norm: float | None


@dataclass(frozen=True)
class Hyperparams:
    """Numbers; None switches a term off."""

    actor: OptimizerHyperparams
    critic: OptimizerHyperparams
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
    banned_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class IterationConfig:
    """Settings of an iteration.

    `kl_slope` is the derivative of `kl_estimator`, for a penalty in the loss. Epochs and
    minibatches are the rows of the order that an update is given.
    """

    generation: GenerationConfig
    kl_estimator: Callable | None = k1
    kl_slope: Callable | None = None
    kl_in_loss: bool = False
    reduction: Callable = token_mean
    whiten_advantages: bool = True
    bootstrap_truncated: bool = False
    recompute_old_logprobs: bool = False
