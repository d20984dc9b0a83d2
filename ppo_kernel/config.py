"""Settings of the stages: static ones (frozen, hashable) and the traced `Hyperparams`.

Changing a static setting compiles a new program. Changing a hyper-parameter never does, and a
batch of them can be vmapped; where one may be None, None switches its term off at trace time.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .ops.kl import k1
from .ops.masked import token_mean
from .types import KLEstimator, Reduction, Scalar


def _strong(x: Scalar) -> Float[Array, ""]:
    return jnp.asarray(x, jnp.result_type(float))


def _strong_or_none(x: Scalar | None) -> Float[Array, ""] | None:
    return None if x is None else _strong(x)


def _required(default: float) -> Any:
    return eqx.field(default=default, converter=_strong)


def _optional(default: float | None = None) -> Any:
    return eqx.field(default=default, converter=_strong_or_none)


class Hyperparams(eqx.Module):
    """What a researcher sweeps: strongly typed rank-0 arrays, traced.

    Attributes:
        learning_rate_actor, learning_rate_critic: step sizes, applied to the optimizer's direction.
        clip_ratio_low, clip_ratio_high: the ratio is clipped to [1 - low, 1 + high].
        dual_clip: bound on ratio times a negative advantage (> 1), or None.
        value_clip: how far values may move from the old ones in one iteration, or None.
        gamma, lam: discount and GAE's lambda, in [0, 1].
        kl_coef: weight of the KL penalty (its initial value if `kl_target` is set).
        kl_target: nats a sequence that the adaptive controller aims at, or None for a fixed weight.
        kl_horizon: sequences over which the controller acts.
        entropy_coef: weight of the entropy bonus.
        value_coef: weight of the value loss; matters where policy and critic share a trunk.
        temperature: > 0; one function for sampling, old, new and reference log-probabilities.
        top_p, min_p: restrictions of sampling, or None.
        max_grad_norm_actor, max_grad_norm_critic: global-norm clips, or None.
        missing_eos_penalty: subtracted from the score of a truncated response.
        score_clip: scores are clipped to [-score_clip, score_clip], or None.
    """

    learning_rate_actor: Scalar = _required(1e-5)
    learning_rate_critic: Scalar = _required(1e-5)
    clip_ratio_low: Scalar = _required(0.2)
    clip_ratio_high: Scalar = _required(0.2)
    dual_clip: Scalar | None = _optional()
    value_clip: Scalar | None = _optional(0.2)
    gamma: Scalar = _required(1.0)
    lam: Scalar = _required(0.95)
    kl_coef: Scalar = _required(0.05)
    kl_target: Scalar | None = _optional()
    kl_horizon: Scalar = _required(10_000.0)
    entropy_coef: Scalar = _required(0.0)
    value_coef: Scalar = _required(1.0)
    temperature: Scalar = _required(1.0)
    top_p: Scalar | None = _optional()
    min_p: Scalar | None = _optional()
    max_grad_norm_actor: Scalar | None = _optional(1.0)
    max_grad_norm_critic: Scalar | None = _optional(1.0)
    missing_eos_penalty: Scalar = _required(0.0)
    score_clip: Scalar | None = _optional()


@dataclass(frozen=True)
class GenerationConfig:
    """Static settings of a rollout.

    Attributes:
        max_new_tokens: T, the response slots.
        eos_token_ids: every id that ends a response; may be empty.
        pad_token_id: what unused response slots hold; any id, it changes nothing else.
        min_new_tokens: EOS is banned before this many tokens.
        top_k: sampling keeps the k most likely tokens; None keeps all.
        samples_per_prompt: G, responses that share one prefill.

    Raises:
        ValueError: a count is out of its range.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    min_new_tokens: int = 0
    top_k: int | None = None
    samples_per_prompt: int = 1

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be between 0 and max_new_tokens={self.max_new_tokens}, "
                f"got {self.min_new_tokens}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for no limit; got {self.top_k}.")
        if self.samples_per_prompt < 1:
            raise ValueError(
                f"samples_per_prompt must be at least 1, got {self.samples_per_prompt}."
            )
        if any(i < 0 for i in (*self.eos_token_ids, self.pad_token_id)):
            raise ValueError(
                "token ids cannot be negative, got "
                f"eos_token_ids={self.eos_token_ids}, pad_token_id={self.pad_token_id}."
            )


@dataclass(frozen=True)
class IterationConfig:
    """Static settings of one PPO iteration.

    Attributes:
        generation: settings of the rollout.
        num_epochs: passes over the experience.
        num_minibatches: optimizer steps an epoch; divides the number of sequences.
        microbatch_size: sequences (over all devices) per forward and backward pass; None takes a
            whole minibatch. It decides memory, never the result.
        reward_kl: estimator of the KL penalty inside the rewards, or None.
        loss_kl: estimator of the KL penalty inside the loss, or None.
        reduction: weights of the tokens in a loss.
        whiten_advantages: over all valid tokens of the whole batch.
        bootstrap_truncated: a response that ran out of room continues with the critic's value;
            otherwise it ends like one with EOS.
        recompute_old_logprobs: by a teacher-forced pass, instead of the rollout's own (matters
            where the cached and the full forward differ in rounding, as in bfloat16).
        logprob_chunk_size: tokens that pass the output head at a time; None for all.

    Raises:
        ValueError: a count is out of its range.
    """

    generation: GenerationConfig
    num_epochs: int = 4
    num_minibatches: int = 1
    microbatch_size: int | None = None
    reward_kl: KLEstimator | None = k1
    loss_kl: KLEstimator | None = None
    reduction: Reduction = token_mean
    whiten_advantages: bool = True
    bootstrap_truncated: bool = False
    recompute_old_logprobs: bool = False
    logprob_chunk_size: int | None = None

    def __post_init__(self):
        for name in ("num_epochs", "num_minibatches", "microbatch_size", "logprob_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
