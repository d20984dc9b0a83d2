"""`PPOConfig`: the familiar flat settings, checked, and translated to those of the kernel."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import optax

from ..advantages import gae, whitened
from ..config import GenerationConfig, Hyperparams, IterationConfig, OptimizerHyperparams
from ..functions import AdvantageEstimator, KLEstimator
from ..learner.optimizer import matrices
from ..learner.state import Learner
from ..ops.checks import FRACTION, POSITIVE, SHARE, Range, check_whole
from ..ops.kl import k1

NOT_NEGATIVE = Range(0)
_CHECK = "check"


def _number(default: float | None, limits: Range, *, optional: bool = False) -> Any:
    """A field for a number; None is allowed where it is the default, or `optional`."""

    def check(name: str, value: float | None) -> None:
        if value is not None and np.ndim(value) != 0:
            raise ValueError(f"{name} must be one number, got {value!r}.")
        if value is not None or not (optional or default is None):
            limits.check(name, value)

    return field(default=default, metadata={_CHECK: check})


def _count(default: int | None, *, least: int = 1, optional: bool = False) -> Any:
    """A field for a whole number of at least `least`; None as in `_number`."""
    check = partial(check_whole, least=least, optional=optional or default is None)
    return field(default=default, metadata={_CHECK: check})


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a PPO run.

    Attributes:
        learning_rate_actor, learning_rate_critic: Adam's step size.
        learning_rate_schedule: iteration -> factor on both rates; None keeps them.
        clip_ratio: the ratio is clipped to [1 - clip_ratio, 1 + clip_ratio_high].
        clip_ratio_high: None takes `clip_ratio`.
        dual_clip: bound on the ratio times a negative advantage, above 1; None for none.
        value_clip: bound on the change of a value within an iteration; None for none.
        gamma: discount.
        lambda_gae: GAE's lambda.
        num_ppo_epochs: passes over a batch.
        train_batch_size: sequences per iteration (prompts * samples_per_prompt).
        num_minibatches: optimizer steps per epoch.
        per_device_batch_size: sequences per device and micro-batch. Below a device's share of a
            minibatch, gradients are accumulated. It never changes the result.
        sft_model_path, reward_model_path: model folders; the caller loads them.
        kl_coeff: weight of the KL penalty (its start where `kl_target` is set).
        kl_target: KL in nats per sequence that the coefficient is adapted to; None keeps it fixed.
        kl_horizon: sequences over which the adaptive coefficient acts.
        kl_estimator: k1, k2 or k3 of `ppo_kernel.kl`, or a function of your own.
        kl_in_loss: the penalty is a loss term instead of a part of the rewards.
        max_seq_len: bound on prompt + response tokens.
        max_new_tokens: response tokens; None for `max_seq_len` less the prompt.
        min_new_tokens: EOS is banned before this many tokens.
        samples_per_prompt: responses to each prompt of a batch.
        temperature: of sampling and of all log-probabilities.
        top_k: sampling keeps the k likeliest tokens; None keeps all.
        top_p: sampling keeps the likeliest tokens that hold this probability; None keeps all.
        min_p: sampling drops tokens less likely than this share of the likeliest; None keeps all.
        decode_slots: sequences decoded at a time on all devices; see `GenerationConfig`.
        entropy_coeff: weight of the entropy bonus.
        value_coeff: weight of the value loss; 0 freezes the critic.
        max_grad_norm: clip of the norm of the actor's and of the critic's gradient; None for none.
        missing_eos_penalty: subtracted from the score of a response without EOS.
        score_clip: scores are clipped to [-score_clip, score_clip]; None for none.
        whiten_advantages: those of `gae` to mean 0 and deviation 1 over all tokens of the batch; an
            estimator of your own is taken as it is, see `whitened`.
        bootstrap_truncated: the critic's value follows a response that ended without EOS.
        recompute_old_logprobs: by a whole forward pass, instead of those of the rollout.
        logprob_chunk_size: tokens that pass the output head at a time; None for all.
        response_widths: response widths, ascending, that the update is compiled for besides the
            largest; they decide speed, never the result.
        weight_decay: decoupled, on the matrices of actor and critic.

    Raises:
        ValueError: a value is out of its range.
    """

    learning_rate_actor: float = _number(1e-5, NOT_NEGATIVE)
    learning_rate_critic: float = _number(1e-5, NOT_NEGATIVE)
    learning_rate_schedule: Callable[[int], float] | None = None
    clip_ratio: float = _number(0.2, FRACTION)
    clip_ratio_high: float | None = _number(None, NOT_NEGATIVE)
    dual_clip: float | None = _number(None, Range(1, above=True))
    value_clip: float | None = _number(0.2, POSITIVE, optional=True)
    gamma: float = _number(1.0, FRACTION)
    lambda_gae: float = _number(0.95, FRACTION)
    num_ppo_epochs: int = _count(4)
    train_batch_size: int = _count(64)
    num_minibatches: int = _count(1)
    per_device_batch_size: int | None = _count(None)
    sft_model_path: str | os.PathLike | None = None
    reward_model_path: str | os.PathLike | None = None
    kl_coeff: float = _number(0.05, NOT_NEGATIVE)
    kl_target: float | None = _number(None, POSITIVE)
    kl_horizon: float = _number(10_000.0, POSITIVE)
    kl_estimator: KLEstimator = k1
    kl_in_loss: bool = False
    max_seq_len: int = _count(512)
    max_new_tokens: int | None = _count(None)
    min_new_tokens: int = _count(0, least=0)
    samples_per_prompt: int = _count(1)
    temperature: float = _number(1.0, POSITIVE)
    top_k: int | None = _count(None)
    top_p: float | None = _number(None, SHARE)
    min_p: float | None = _number(None, FRACTION)
    decode_slots: int | None = _count(None)
    entropy_coeff: float = _number(0.0, Range())
    value_coeff: float = _number(1.0, NOT_NEGATIVE)
    max_grad_norm: float | None = _number(1.0, POSITIVE, optional=True)
    missing_eos_penalty: float = _number(0.0, Range())
    score_clip: float | None = _number(None, POSITIVE)
    whiten_advantages: bool = True
    bootstrap_truncated: bool = False
    recompute_old_logprobs: bool = False
    logprob_chunk_size: int | None = _count(1024, optional=True)
    response_widths: tuple[int, ...] = ()
    weight_decay: float = _number(0.0, NOT_NEGATIVE)

    def __post_init__(self):
        for setting in fields(self):
            if _CHECK in setting.metadata:
                setting.metadata[_CHECK](setting.name, vars(self)[setting.name])
        if not callable(self.kl_estimator):
            raise ValueError(
                f"kl_estimator must be a function such as ops.kl.k1; got {self.kl_estimator!r}."
            )
        if self.kl_target is not None and self.kl_coeff == 0.0:
            raise ValueError(
                f"kl_coeff=0 with kl_target={self.kl_target}: the controller multiplies the "
                "coefficient, which would stay 0; start it above, or leave the target out."
            )
        if self.train_batch_size % (self.samples_per_prompt * self.num_minibatches):
            raise ValueError(
                f"train_batch_size={self.train_batch_size} is not a multiple of "
                f"samples_per_prompt={self.samples_per_prompt} * "
                f"num_minibatches={self.num_minibatches}."
            )
        # The kernel refuses settings that do not fit each other, under the names used here. The
        # shortest prompt and the largest number of devices pass wherever any do; the trainer
        # checks its own.
        self.iteration(self.generation(1, (), 0), num_devices=self.train_batch_size)

    @property
    def num_prompts(self) -> int:
        """Prompts per iteration."""
        return self.train_batch_size // self.samples_per_prompt

    def hyperparams(self, iteration: int = 0) -> Hyperparams:
        """The traced settings of an iteration."""
        schedule = self.learning_rate_schedule
        factor = 1.0 if schedule is None else float(schedule(iteration))
        high = self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high
        return Hyperparams(
            actor=OptimizerHyperparams(self.learning_rate_actor * factor, self.max_grad_norm),
            critic=OptimizerHyperparams(self.learning_rate_critic * factor, self.max_grad_norm),
            clip_ratio_low=self.clip_ratio,
            clip_ratio_high=high,
            dual_clip=self.dual_clip,
            value_clip=self.value_clip,
            gamma=self.gamma,
            lam=self.lambda_gae,
            kl_coef=self.kl_coeff,
            kl_target=self.kl_target,
            kl_horizon=self.kl_horizon,
            entropy_coef=self.entropy_coeff,
            value_coef=self.value_coeff,
            temperature=self.temperature,
            top_p=self.top_p,
            min_p=self.min_p,
            missing_eos_penalty=self.missing_eos_penalty,
            score_clip=self.score_clip,
        )

    def generation(
        self,
        prompt_width: int,
        eos_token_ids: tuple[int, ...],
        pad_token_id: int,
        banned_token_ids: tuple[int, ...] = (),
    ) -> GenerationConfig:
        """Settings of the rollout for prompts of `prompt_width` slots.

        `eos_token_ids`, `pad_token_id` and `banned_token_ids` are those of the `CausalLM`.

        Raises:
            ValueError: prompt and response do not fit into `max_seq_len`.
        """
        longest, wanted = self.max_seq_len - prompt_width, self.max_new_tokens
        if longest < (1 if wanted is None else wanted):
            raise ValueError(
                f"a prompt of {prompt_width} slots and {wanted or 1} new tokens do not fit into "
                f"max_seq_len={self.max_seq_len}; shorten the prompts or raise it."
            )
        return GenerationConfig(
            max_new_tokens=longest if wanted is None else wanted,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            min_new_tokens=self.min_new_tokens,
            top_k=self.top_k,
            samples_per_prompt=self.samples_per_prompt,
            decode_slots=self.decode_slots,
            banned_token_ids=banned_token_ids,
        )

    def iteration(self, generation: GenerationConfig, num_devices: int = 1) -> IterationConfig:
        """Static settings of an iteration around its `generation`, on `num_devices`.

        Raises:
            ValueError: a minibatch does not divide into `per_device_batch_size` on all devices.
        """
        minibatch = self.train_batch_size // self.num_minibatches
        size = None
        if self.per_device_batch_size is not None:
            size = min(self.per_device_batch_size * num_devices, minibatch)
            if minibatch % size:
                raise ValueError(
                    f"a minibatch of {minibatch} sequences does not divide into micro-batches of "
                    f"per_device_batch_size={self.per_device_batch_size} on {num_devices} devices."
                )
        return IterationConfig(
            generation=generation,
            num_epochs=self.num_ppo_epochs,
            num_minibatches=self.num_minibatches,
            microbatch_size=size,
            kl_estimator=self.kl_estimator,
            kl_in_loss=self.kl_in_loss,
            bootstrap_truncated=self.bootstrap_truncated,
            recompute_old_logprobs=self.recompute_old_logprobs,
            logprob_chunk_size=self.logprob_chunk_size,
            response_widths=self.response_widths,
        )

    def estimator(self) -> AdvantageEstimator:
        """GAE, whitened where asked for."""
        return whitened(gae) if self.whiten_advantages else gae

    def learner(self) -> Learner:
        """Adam directions, with decoupled weight decay where asked for."""

        def optimizer() -> optax.GradientTransformation:
            if self.weight_decay == 0.0:
                return optax.scale_by_adam()
            decay = optax.add_decayed_weights(self.weight_decay, mask=matrices)
            return optax.chain(optax.scale_by_adam(), decay)

        return Learner(actor_optimizer=optimizer(), critic_optimizer=optimizer())
