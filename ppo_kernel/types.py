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

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
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
        sample_ids: the caller's, distinct within a batch, below 2^31 / G for G samples per prompt.
            The noise of a prompt's samples depends on its id, not on its place in the batch.
    """

    tokens: Int[Array, "N P"]
    mask: Bool[Array, "N P"]
    sample_ids: Int[Array, " N"]

    @classmethod
    def from_ids(
        cls,
        lists: Sequence[Sequence[int]],
        pad_id: int = 0,
        width: int | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> "Prompts":
        """Prompts from lists of token ids, padded on the left.

        Args:
            lists: N prompts, none empty.
            pad_id: what padding slots hold; any id.
            width: P; None for that of the longest prompt.
            sample_ids: N distinct whole numbers; None for 0 to N - 1.

        Returns:
            N prompts.

        Raises:
            ValueError: no prompt, an empty one, one longer than `width`, ids that are not whole
                numbers, or another number of sample ids.
        """
        for index, ids in enumerate(lists):
            if not len(ids):
                raise ValueError(f"prompt {index} is empty; give it one token at least.")
        tokens, mask = _padded("prompt", lists, pad_id, width, left=True)
        numbers = np.arange(len(tokens)) if sample_ids is None else np.asarray(sample_ids)
        if numbers.shape != (len(tokens),) or numbers.dtype.kind not in "iu":
            raise ValueError(f"sample_ids must be {len(tokens)} whole numbers, got {sample_ids!r}.")
        return cls(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(numbers, jnp.int32))


class Rollout(eqx.Module):
    """Sampled responses and their log-probabilities (stage 1).

    Attributes:
        prompt_tokens, prompt_mask: each prompt, repeated for its samples.
        sample_ids: one per sequence; its noise depends on it.
        tokens: of the response, right-padded.
        mask: the response tokens that are trained on (for a generated rollout all of them).
        lengths: tokens of each response, EOS included.
        terminated: true where an EOS ended the response, false where its slots ran out.
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

    @classmethod
    def from_responses(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        eos_token_ids: tuple[int, ...] = (),
        pad_id: int = 0,
    ) -> "Rollout":
        """A rollout from lists of token ids, to try a reward or a loss by hand.

        Args:
            prompts: B of them, one per response, none empty.
            responses: B of them, the EOS included where one was sampled; one may be empty.
            eos_token_ids: a response that ends with one of these is terminated.
            pad_id: what padding slots hold; any id.

        Returns:
            B sequences with sample ids 0 to B - 1. Both log-probabilities are 0: take those of a
            policy from `response_logprobs`.

        Raises:
            ValueError: another number of responses than of prompts, or what `Prompts.from_ids`
                refuses.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses.")
        batch = Prompts.from_ids(prompts, pad_id)
        tokens, mask = _padded("response", responses, pad_id, None, left=False)
        zeros = jnp.zeros(tokens.shape)
        return cls(
            prompt_tokens=batch.tokens,
            prompt_mask=batch.mask,
            sample_ids=batch.sample_ids,
            tokens=jnp.asarray(tokens),
            mask=jnp.asarray(mask),
            lengths=jnp.asarray(mask.sum(axis=1), jnp.int32),
            terminated=jnp.asarray([bool(len(r)) and r[-1] in eos_token_ids for r in responses]),
            logprobs=zeros,
            behaviour_logprobs=zeros,
        )


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
    """All that the update needs (stages 3 and 4 done), each field by its name.

    Attributes:
        rollout: tokens and masks.
        old_logprobs: under the policy that acted, nats.
        reference_logprobs: under the frozen policy, nats.
        old_values: the critic's at the time of the rollout, reward units.
        advantages: as the policy loss takes them.
        returns: regression targets of the critic, reward units.
    """

    _: KW_ONLY
    rollout: Rollout
    old_logprobs: Float[Array, "B T"]
    reference_logprobs: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


class LossInputs(eqx.Module):
    """What a policy loss sees: whole sequences of a minibatch.

    Every array is 0 where `mask` is false, so that no product with such a slot is NaN.

    Attributes:
        logprobs: of the response tokens under the policy in training, nats; with its gradient.
        old_logprobs: under the policy that acted, nats.
        behaviour_logprobs: under the restricted distribution that was sampled from, nats.
        reference_logprobs: under the frozen policy, nats.
        entropy: of the distribution of each token under the policy in training, nats; with its
            gradient.
        advantages: constant with respect to the parameters.
        mask: the tokens that are trained on.
        weights: of each token in the sum that is minimised, those of the whole minibatch.
    """

    logprobs: Float[Array, "M T"]
    old_logprobs: Float[Array, "M T"]
    behaviour_logprobs: Float[Array, "M T"]
    reference_logprobs: Float[Array, "M T"]
    entropy: Float[Array, "M T"]
    advantages: Float[Array, "M T"]
    mask: Bool[Array, "M T"]
    weights: Float[Array, "M T"]


class ValueLossInputs(eqx.Module):
    """What a value loss sees, as in `LossInputs`; reward units.

    Attributes:
        values: of the critic in training, before each response token; with its gradient.
        old_values: at the time of the rollout.
        returns: regression targets.
        mask: the tokens that are trained on.
        weights: of each token in the sum that is minimised, those of the whole minibatch.
    """

    values: Float[Array, "M T"]
    old_values: Float[Array, "M T"]
    returns: Float[Array, "M T"]
    mask: Bool[Array, "M T"]
    weights: Float[Array, "M T"]


TokenMetrics: TypeAlias = dict[str, Real[Array, "M T"] | Bool[Array, "M T"]]
"""Name -> a number per token; its mean over valid tokens and optimizer steps is reported."""


def _padded(
    name: str, lists: Sequence[Sequence[int]], pad_id: int, width: int | None, *, left: bool
) -> tuple[Int[np.ndarray, "N S"], Bool[np.ndarray, "N S"]]:
    """Ragged ids as a rectangle, and the mask of its tokens."""
    if not len(lists):
        raise ValueError(f"there is no {name}.")
    rows = [np.asarray(ids if len(ids) else np.zeros(0, np.int32)) for ids in lists]
    for index, row in enumerate(rows):
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise ValueError(f"{name} {index} must be a list of token ids, got {lists[index]!r}.")
    lengths = np.asarray([len(row) for row in rows])
    width = max(1, int(lengths.max())) if width is None else width
    if lengths.max() > width:
        raise ValueError(
            f"{name} {lengths.argmax()} has {lengths.max()} tokens, more than width={width}; "
            "truncate it or raise the width."
        )
    slots = np.arange(width)[None]
    mask = slots >= width - lengths[:, None] if left else slots < lengths[:, None]
    tokens = np.full(mask.shape, pad_id, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask
