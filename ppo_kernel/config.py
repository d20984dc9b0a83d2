"""Settings of the stages: static ones (frozen, hashable) and the traced `Hyperparams`.

Changing a static setting compiles a new program. Changing a hyper-parameter never does, and a
batch of them can be vmapped; where one may be None, None switches its term off at trace time.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .functions import KLEstimator, Reduction
from .losses import token_mean
from .ops.checks import FRACTION, POSITIVE, SHARE, TEMPERATURE, Range, check_whole
from .ops.kl import k1
from .types import Scalar


def _setting(name: str, default: float | None, limits: Range, *, optional: bool = False) -> Any:
    """A traced field: checked, then made a strongly typed array."""

    def strong(x: Scalar | None) -> Float[Array, ""] | None:
        if x is None and optional:
            return None
        limits.check(name, x)
        number = jnp.asarray(x, jnp.result_type(float))
        if number.ndim:
            raise ValueError(
                f"{name} must be a scalar, got shape {number.shape}; to sweep it, vmap a function "
                "that makes its Hyperparams from one scalar."
            )
        return number

    return eqx.field(default=default, converter=strong)


_ANY, _NOT_NEGATIVE = Range(), Range(0)


class OptimizerHyperparams(eqx.Module):
    """How far one model steps: strongly typed rank-0 arrays, traced.

    Attributes:
        learning_rate: step size, applied to the optimizer's direction.
        max_grad_norm: clip of the gradient's global norm, or None.

    Raises:
        ValueError: a number that is not finite or out of its range, or no scalar.
    """

    learning_rate: Scalar = _setting("learning_rate", 1e-5, _NOT_NEGATIVE)
    max_grad_norm: Scalar | None = _setting("max_grad_norm", 1.0, POSITIVE, optional=True)


class Hyperparams(eqx.Module):
    """What a researcher sweeps: strongly typed rank-0 arrays, traced.

    Attributes:
        actor, critic: learning rate and gradient clip of each model.
        clip_ratio_low, clip_ratio_high: the ratio is clipped to [1 - low, 1 + high].
        dual_clip: bound on ratio times a negative advantage (> 1), or None.
        value_clip: how far values may move from the old ones in one iteration, or None.
        gamma, lam: discount and GAE's lambda, in [0, 1].
        kl_coef: weight of the KL penalty (its initial value if `kl_target` is set).
        kl_target: nats per sequence that the adaptive controller aims at; None for a fixed weight.
        kl_horizon: sequences over which the controller acts.
        entropy_coef: weight of the entropy bonus.
        value_coef: weight of the value loss. It scales a separate critic's gradient before its norm
            is clipped, and 0 freezes that critic; on a shared trunk it weighs the two losses.
        temperature: > 0; one function for sampling, old, new and reference log-probabilities.
        top_p, min_p: restrictions of sampling, or None.
        missing_eos_penalty: subtracted from the score of a truncated response.
        score_clip: scores are clipped to [-score_clip, score_clip], or None.

    Raises:
        ValueError: a number that is not finite or out of its range, or no scalar.
    """

    actor: OptimizerHyperparams = eqx.field(default_factory=OptimizerHyperparams)
    critic: OptimizerHyperparams = eqx.field(default_factory=OptimizerHyperparams)
    clip_ratio_low: Scalar = _setting("clip_ratio_low", 0.2, FRACTION)
    clip_ratio_high: Scalar = _setting("clip_ratio_high", 0.2, _NOT_NEGATIVE)
    dual_clip: Scalar | None = _setting("dual_clip", None, Range(1, above=True), optional=True)
    value_clip: Scalar | None = _setting("value_clip", 0.2, POSITIVE, optional=True)
    gamma: Scalar = _setting("gamma", 1.0, FRACTION)
    lam: Scalar = _setting("lam", 0.95, FRACTION)
    kl_coef: Scalar = _setting("kl_coef", 0.05, _NOT_NEGATIVE)
    kl_target: Scalar | None = _setting("kl_target", None, POSITIVE, optional=True)
    kl_horizon: Scalar = _setting("kl_horizon", 10_000.0, POSITIVE)
    entropy_coef: Scalar = _setting("entropy_coef", 0.0, _ANY)
    value_coef: Scalar = _setting("value_coef", 1.0, _NOT_NEGATIVE)
    temperature: Scalar = _setting("temperature", 1.0, TEMPERATURE)
    top_p: Scalar | None = _setting("top_p", None, SHARE, optional=True)
    min_p: Scalar | None = _setting("min_p", None, FRACTION, optional=True)
    missing_eos_penalty: Scalar = _setting("missing_eos_penalty", 0.0, _ANY)
    score_clip: Scalar | None = _setting("score_clip", None, POSITIVE, optional=True)


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
        decode_slots: C sequences are decoded at a time, over all devices. The slot of one that has
            ended is refilled from the batch; the next C prompts are prefilled in advance, and use
            memory too. None: the whole batch in lockstep. Affects speed and memory only.
        banned_token_ids: ids that are never sampled, such as the rows of an embedding that stand
            for no text. As top-k, they restrict sampling only.

    Raises:
        ValueError: a count is out of its range.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    min_new_tokens: int = 0
    top_k: int | None = None
    samples_per_prompt: int = 1
    decode_slots: int | None = None
    banned_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_whole("max_new_tokens", self.max_new_tokens)
        check_whole("samples_per_prompt", self.samples_per_prompt)
        check_whole("top_k", self.top_k, optional=True)
        check_whole("decode_slots", self.decode_slots, optional=True)
        check_whole("min_new_tokens", self.min_new_tokens, least=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens={self.max_new_tokens}, "
                f"got {self.min_new_tokens}."
            )
        if self.decode_slots is not None and self.decode_slots % self.samples_per_prompt:
            raise ValueError(
                "decode_slots must be a multiple of samples_per_prompt="
                f"{self.samples_per_prompt}, or None for the whole batch; got {self.decode_slots}."
            )
        named = {"eos_token_ids": self.eos_token_ids, "banned_token_ids": self.banned_token_ids}
        for name, ids in named.items():
            if not isinstance(ids, tuple):
                raise ValueError(f"{name} must be a tuple such as (2,), got {ids!r}.")
            for token_id in ids:
                check_whole(name, token_id, least=0)
        check_whole("pad_token_id", self.pad_token_id, least=0)
        if self.pad_token_id > np.iinfo(np.int32).max:
            raise ValueError(f"pad_token_id must fit into int32, got {self.pad_token_id}.")


@dataclass(frozen=True)
class IterationConfig:
    """Static settings of one PPO iteration.

    Attributes:
        generation: settings of the rollout.
        num_epochs: passes over the experience.
        num_minibatches: optimizer steps per epoch; divides the number of sequences.
        microbatch_size: sequences (over all devices) per forward and backward pass; None for a
            whole minibatch. Affects memory only.
        kl_estimator: of the KL penalty, or None for no penalty.
        kl_in_loss: the penalty is a term of the loss instead of a part of the rewards.
        reduction: weights of the tokens in a loss.
        bootstrap_truncated: a response that ran out of room continues with the critic's value;
            otherwise it ends like one with EOS.
        recompute_old_logprobs: by a teacher-forced pass, instead of the rollout's own (matters
            where the cached and the full forward differ in rounding, as in bfloat16).
        logprob_chunk_size: tokens that pass the output head at a time; None for all.
        response_widths: numbers of response slots, ascending, that the update is compiled for
            besides T. A minibatch is sorted by length, and each micro-batch takes the narrowest
            that holds its longest response. Affects speed only.

    Raises:
        ValueError: a count is out of its range, or widths are not ascending.
    """

    generation: GenerationConfig
    num_epochs: int = 4
    num_minibatches: int = 1
    microbatch_size: int | None = None
    kl_estimator: KLEstimator | None = k1
    kl_in_loss: bool = False
    reduction: Reduction = token_mean
    bootstrap_truncated: bool = False
    recompute_old_logprobs: bool = False
    logprob_chunk_size: int | None = 1024
    response_widths: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.generation, GenerationConfig):
            raise ValueError(f"generation must be a GenerationConfig, got {self.generation!r}.")
        check_whole("num_epochs", self.num_epochs)
        check_whole("num_minibatches", self.num_minibatches)
        check_whole("microbatch_size", self.microbatch_size, optional=True)
        check_whole("logprob_chunk_size", self.logprob_chunk_size, optional=True)
        if not isinstance(self.response_widths, tuple):
            raise ValueError(
                f"response_widths must be a tuple such as (64, 128), got {self.response_widths!r}."
            )
        for width in self.response_widths:
            check_whole("response_widths", width)
        if any(narrow >= wide for narrow, wide in pairwise(self.response_widths)):
            raise ValueError(f"response_widths must be ascending, got {self.response_widths}.")
        for name, function, optional in (
            ("kl_estimator", self.kl_estimator, True), ("reduction", self.reduction, False),
        ):  # fmt: skip
            if not callable(function) and not (function is None and optional):
                none = ", or None" if optional else ""
                raise ValueError(
                    f"{name} must be a function such as ops.kl.k1 or losses.token_mean{none}; "
                    f"got {function!r}."
                )
