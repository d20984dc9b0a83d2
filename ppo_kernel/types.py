"""Axis names, array aliases and the records that travel between the stages.

Axes, used in every annotation of the package:

    N  prompts                 G  samples per prompt        B  sequences, B = N * G
    P  prompt slots            T  response slots            S  all slots, S = P + T
    V  vocabulary              D  model width               F  MLP width
    L  layers                  H  query heads               K  key/value heads
    E  head dimension          M  sequences of a minibatch

Prompts are left-padded and responses right-padded. A mask says which slots hold a
token; it comes from lengths or from the caller, never from comparing with a pad id.
"""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

Scalar: TypeAlias = Real[ArrayLike, ""]
"""A Python number or a rank-0 array: what a traced hyper-parameter may be."""

Metrics: TypeAlias = dict[str, Float[Array, ""]]
"""Name -> rank-0 array; counters are whole numbers kept as floats."""


class Prompts(eqx.Module):
    """A batch of prompts, the input of an iteration.

    Attributes:
        tokens: ids, left-padded.
        mask: which slots hold a token.
        sample_ids: the caller's, distinct within a batch, below 2^31 / G for G samples a prompt:
            the noise of a prompt's samples depends on its id, not on its place in the batch.
    """

    tokens: Int[Array, "N P"]
    mask: Bool[Array, "N P"]
    sample_ids: Int[Array, " N"]


class Rollout(eqx.Module):
    """What the policy wrote, and how likely it was (stage 1).

    Attributes:
        prompt_tokens, prompt_mask: each prompt, repeated for its samples.
        sample_ids: one a sequence; its noise depends on it.
        tokens: of the response, right-padded.
        mask: the response tokens that are trained on (for a generated rollout all of them).
        lengths: tokens of each response, EOS included.
        terminated: true where an EOS ended the response, false where the room ran out.
        logprobs: of the tokens under the policy, nats.
        behaviour_logprobs: under the restricted distribution that was sampled from, nats.
    """

    prompt_tokens: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    sample_ids: Int[Array, " B"]
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    lengths: Int[Array, " B"]
    terminated: Bool[Array, " B"]
    logprobs: Float[Array, "B T"]
    behaviour_logprobs: Float[Array, "B T"]


class Evaluation(eqx.Module):
    """What the frozen and the value models say of a rollout (stage 2).

    Attributes:
        reference_logprobs: of the response tokens under the frozen policy, nats.
        values: the critic's before response token t, reward units.
        bootstrap_values: the critic's after the last token, reward units.
    """

    reference_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]
    bootstrap_values: Float[Array, " B"]


class Experience(eqx.Module):
    """All that the update needs (stages 3 and 4 done).

    Attributes:
        rollout: tokens and masks.
        old_logprobs: under the policy that acted, nats.
        reference_logprobs: under the frozen policy, nats.
        old_values: the critic's at the time of the rollout, reward units.
        advantages: as the policy loss takes them, whitened if so configured.
        returns: regression targets of the critic, reward units.
    """

    rollout: Rollout
    old_logprobs: Float[Array, "B T"]
    reference_logprobs: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


RewardFn: TypeAlias = Callable[[Rollout], Float[Array, " B"] | Float[Array, "B T"]]
"""rollout -> one score a sequence [B], or one a token [B, T].

A JAX-traceable one (a function, or an `eqx.Module` with parameters) sits inside the single
program; a Python one runs between `collect` and `learn`.
"""

KLEstimator: TypeAlias = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]
"""log-ratio log(policy / reference) per token -> KL estimate per token, in nats."""

Reduction: TypeAlias = Callable[[Bool[Array, "M T"]], Float[Array, "M T"]]
"""Response mask of a whole minibatch -> weight of each token; a loss is sum(weight * loss)."""

AdvantageEstimator: TypeAlias = Callable[..., tuple[Float[Array, "B T"], Float[Array, "B T"]]]
"""(rewards, values, mask, bootstrap_values, *, gamma, lam) -> (advantages, returns), all [B, T]."""

PolicyLoss: TypeAlias = Callable[..., Float[Array, "M T"]]
"""(logprobs, old_logprobs, advantages, *, clip_ratio_low, clip_ratio_high, dual_clip) -> [M, T]."""

ValueLoss: TypeAlias = Callable[..., Float[Array, "M T"]]
"""(values, old_values, returns, *, value_clip) -> [M, T]."""
