"""Stage 5b, inside: the gradient of one minibatch, summed over its micro-batches."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..config import Hyperparams, IterationConfig
from ..evaluation import critic_values, response_hidden, response_logprobs, response_values
from ..ops.checks import check_pair, check_shape
from ..ops.dtypes import upcast_tree
from ..ops.kl import is_clamped
from ..ops.masked import masked_sum
from ..sharding import at_rest, gather, shard_batch
from ..types import Experience, LossInputs, Metrics, TokenMetrics, ValueLossInputs
from .reports import StepSums, join
from .state import Learner, Models


class LossSettings(NamedTuple):
    """What a loss is made of besides models and data.

    Attributes:
        hyperparams, config: as in `update`.
        kl_coef: weight of the KL in the loss.
        learner: has the losses.
    """

    hyperparams: Hyperparams
    kl_coef: Float[Array, ""]
    config: IterationConfig
    learner: Learner


class MicroBatch(NamedTuple):
    """Some sequences of a minibatch.

    Attributes:
        experience: m sequences.
        weights: of each token in the sum over the whole minibatch.
    """

    experience: Experience
    weights: Float[Array, "m T"]


def minibatch_gradients(
    trained: Models, models: Models, minibatch: Experience, settings: LossSettings
) -> tuple[Models, StepSums]:
    """Gradients of the loss of a minibatch, one micro-batch after the other.

    The weights of `config.reduction` are those of the whole minibatch, so the sum over its
    micro-batches is exact.

    Args:
        trained: the parameters to differentiate; None for a model whose loss is left out.
        models: policy and critic, whole.
        minibatch: M sequences.
        settings: see `LossSettings`.

    Returns:
        (gradients of `trained`, in at least float32; sums over valid tokens for the metrics).

    Raises:
        ValueError: the minibatch does not divide into micro-batches; a loss, its metrics or the
            weights have another shape than the mask.
    """
    config, mask = settings.config, minibatch.rollout.mask
    rows = mask.shape[0]
    size = min(config.microbatch_size or rows, rows)
    if rows % size:
        raise ValueError(
            f"a minibatch of {rows} sequences does not divide into micro-batches of {size}; "
            "choose a divisor."
        )
    if config.response_widths:
        # Neighbours of about one length share a micro-batch, so that it can be cut to their own.
        order = jnp.argsort(minibatch.rollout.lengths)
        minibatch = jax.tree.map(lambda x: x[order], minibatch)
    weights = config.reduction(minibatch.rollout.mask)
    check_shape("what reduction returns", weights, mask.shape)

    def loss(trained: Models, part: MicroBatch):
        return _loss(trained, _with(trained, models), part, settings)

    def whole_width(part: MicroBatch):
        gradients, sums = jax.grad(loss, has_aux=True)(trained, shard_batch(part))
        # Constrained twice, so that the split of parameters does not spread into the backward pass.
        return upcast_tree(at_rest(gather(gradients))), sums

    narrow = [width for width in config.response_widths if width < mask.shape[1]]
    backward = _narrowest(whole_width, narrow) if narrow else whole_width
    whole = MicroBatch(minibatch, weights)
    return backward(whole) if rows == size else _accumulated(backward, whole, size)


def _narrowest(backward: Callable, widths: list[int]) -> Callable:
    """`backward` of a micro-batch cut to the narrowest of the widths that holds its responses."""

    def chosen(part: MicroBatch):
        longest = jnp.max(part.experience.rollout.lengths)
        index = jnp.sum(longest > jnp.array(widths, longest.dtype), dtype=jnp.int32)
        cuts = [lambda part, width=width: backward(_trimmed(part, width)) for width in widths]
        return jax.lax.switch(index, [*cuts, backward], part)

    return chosen


def _accumulated(backward: Callable, whole: MicroBatch, size: int):
    """The sum of `backward` over micro-batches of `size` sequences."""
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), whole)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(backward, first))
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, backward(part)), None), zeros, parts
    )
    return total


def _trimmed(part: MicroBatch, width: int) -> MicroBatch:
    """`part` without its response slots from `width` on."""
    cut = jax.tree.map(lambda x: x[:, :width] if x.ndim == 2 else x, part)

    def prompts(part: MicroBatch):
        return part.experience.rollout.prompt_tokens, part.experience.rollout.prompt_mask

    return eqx.tree_at(prompts, cut, prompts(part))


def _with(trained: Models, models: Models) -> Models:
    """The models with the `trained` parameters in their places."""

    def put(parameters: PyTree, model: PyTree) -> PyTree:
        return model if parameters is None else eqx.combine(parameters, model)

    return Models(put(trained.policy, models.policy), put(trained.critic, models.critic))


def _loss(
    trained: Models, models: Models, part: MicroBatch, settings: LossSettings
) -> tuple[Float[Array, ""], StepSums]:
    """Weighted loss of the models that are trained, on a micro-batch; sums for the metrics."""
    rollout, hyperparams = part.experience.rollout, settings.hyperparams
    # Shared by both losses where the critic is a head on the policy's trunk.
    policy_hidden = cache(lambda: response_hidden(models.policy, rollout))
    losses, sums = [], []
    if trained.policy is not None:
        logprobs, entropies = response_logprobs(
            models.policy, rollout, policy_hidden(),
            temperature=hyperparams.temperature, chunk_size=settings.config.logprob_chunk_size,
        )  # fmt: skip
        loss, reported = _policy_terms(logprobs, entropies, part, settings)
        losses.append(loss)
        sums.append(reported)
    if trained.critic is not None:
        values = critic_values(models.critic, rollout, policy_hidden)
        values, _ = response_values(values, rollout)
        loss, reported = _value_terms(values, part, settings)
        losses.append(jnp.asarray(hyperparams.value_coef, loss.dtype) * loss)
        sums.append(reported)
    return sum(losses[1:], losses[0]), StepSums.joined(sums)


def _clean(mask: Bool[Array, "m T"], like: Float[Array, "m T"]) -> Callable:
    """Zeros at masked places, before any exp or product: 0 * inf there would be NaN."""
    return lambda x: jnp.where(mask, x, 0.0).astype(like.dtype)


def _value_terms(
    values: Float[Array, "m T"], part: MicroBatch, settings: LossSettings
) -> tuple[Float[Array, ""], StepSums]:
    """The critic's weighted loss."""
    experience, mask = part.experience, part.experience.rollout.mask
    clean = _clean(mask, values)
    inputs = ValueLossInputs(
        values=clean(values), old_values=clean(experience.old_values),
        returns=clean(experience.returns), mask=mask, weights=clean(part.weights),
    )  # fmt: skip
    output = settings.learner.value_loss(inputs, value_clip=settings.hyperparams.value_clip)
    losses, metrics = check_pair("value_loss", "(loss per token, metrics)", output)
    check_shape("the loss of value_loss", losses, mask.shape)
    loss = jnp.sum(inputs.weights * losses)
    return loss, StepSums(
        terms={"critic_loss": loss},
        tokens=masked_sum(jnp.ones_like(values), mask),
        means=_summed("value_loss", metrics, mask, values.dtype),
        counters={},
    )


def _policy_terms(
    logprobs: Float[Array, "m T"],
    entropies: Float[Array, "m T"],
    part: MicroBatch,
    settings: LossSettings,
) -> tuple[Float[Array, ""], StepSums]:
    """The policy's weighted loss, entropy bonus and KL."""
    experience, hyperparams, config = part.experience, settings.hyperparams, settings.config
    mask = experience.rollout.mask
    clean = _clean(mask, logprobs)
    inputs = LossInputs(
        logprobs=clean(logprobs), old_logprobs=clean(experience.old_logprobs),
        behaviour_logprobs=clean(experience.rollout.behaviour_logprobs),
        reference_logprobs=clean(experience.reference_logprobs), entropy=clean(entropies),
        advantages=clean(experience.advantages), mask=mask, weights=clean(part.weights),
    )  # fmt: skip
    output = settings.learner.policy_loss(
        inputs, clip_ratio_low=hyperparams.clip_ratio_low,
        clip_ratio_high=hyperparams.clip_ratio_high, dual_clip=hyperparams.dual_clip,
    )  # fmt: skip
    losses, metrics = check_pair("policy_loss", "(loss per token, metrics)", output)
    check_shape("the loss of policy_loss", losses, mask.shape)
    weights = inputs.weights
    log_ratios = inputs.logprobs - inputs.reference_logprobs
    steps = inputs.logprobs - inputs.old_logprobs
    terms = {
        "actor_loss": jnp.sum(weights * losses),
        "entropy_bonus": jnp.sum(weights * inputs.entropy),
    }
    entropy_coef = jnp.asarray(hyperparams.entropy_coef, weights.dtype)
    loss = terms["actor_loss"] - entropy_coef * terms["entropy_bonus"]
    if config.kl_in_loss and config.kl_estimator is not None:
        terms["kl_loss"] = jnp.sum(weights * config.kl_estimator(log_ratios))
        loss = loss + settings.kl_coef.astype(weights.dtype) * terms["kl_loss"]
    clamped = is_clamped(steps) | is_clamped(log_ratios)
    return loss, StepSums(
        terms=terms,
        tokens=masked_sum(jnp.ones_like(logprobs), mask),
        means=join(
            {"entropy": masked_sum(inputs.entropy, mask)},
            _summed("policy_loss", metrics, mask, logprobs.dtype),
        ),
        counters={"clamped_log_ratios": masked_sum(clamped.astype(logprobs.dtype), mask)},
        log_ratio=masked_sum(jnp.abs(steps), mask),
    )


def _summed(
    name: str, metrics: TokenMetrics, mask: Bool[Array, "m T"], dtype: jnp.dtype
) -> Metrics:
    """Sums over valid tokens of what a loss reports.

    Raises:
        ValueError: a metric is no number per token.
    """
    for key, value in metrics.items():
        check_shape(f"{key!r}, a metric of {name},", value, mask.shape)
    constant = jax.lax.stop_gradient(metrics)
    return {key: masked_sum(value.astype(dtype), mask) for key, value in constant.items()}
