"""Stage 5b, inside: the gradient of one minibatch, summed over its micro-batches."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..config import Hyperparams, IterationConfig
from ..evaluation import critic_values, response_hidden, response_logprobs, response_values
from ..losses import is_clipped
from ..ops.checks import check_shape
from ..ops.dtypes import upcast_tree
from ..ops.kl import is_clamped, k3
from ..ops.masked import masked_sum
from ..sharding import at_rest, gather, shard_batch
from ..types import Experience
from .state import Learner


def minibatch_gradients(
    models: dict[str, PyTree],
    static: dict[str, PyTree],
    sides: tuple[str, ...],
    minibatch: Experience,
    hyperparams: Hyperparams,
    kl_coef: Float[Array, ""],
    *,
    config: IterationConfig,
    learner: Learner,
) -> tuple[dict[str, PyTree], dict[str, Float[Array, ""]]]:
    """Gradients of the loss of a minibatch, one micro-batch after the other.

    The weights of `config.reduction` are those of the whole minibatch, so the sum over its
    micro-batches is exact.

    Args:
        models, static: parameters of "actor" and "critic", and what else the two are made of.
        sides: whose loss, and whose gradients: one of them, or both.
        minibatch: M sequences.
        hyperparams, config, learner: as in `update`.
        kl_coef: weight of the KL in the loss.

    Returns:
        (gradients by side, in at least float32; sums over valid tokens for the metrics).

    Raises:
        ValueError: the minibatch does not divide into micro-batches; a loss or the weights have
            another shape than the mask.
    """
    rows = len(minibatch.returns)
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
    check_shape("what reduction returns", weights, minibatch.rollout.mask.shape)

    def loss(trained, part: tuple[Experience, Float[Array, "m T"]]):
        whole = eqx.combine(models | trained, static)
        return _loss(whole, sides, *part, hyperparams, kl_coef, config=config, learner=learner)

    trained = {side: models[side] for side in sides}

    def whole_width(part):
        gradients, sums = jax.grad(loss, has_aux=True)(trained, shard_batch(part))
        # Constrained twice, so that the split of parameters does not spread into the backward pass.
        return upcast_tree(at_rest(gather(gradients))), sums

    def backward(part):
        widths = [w for w in config.response_widths if w < weights.shape[1]]
        branches = [lambda part, w=w: whole_width(_trimmed(part, w)) for w in widths]
        if not branches:
            return whole_width(part)
        longest = jnp.max(part[0].rollout.lengths)
        index = jnp.sum(longest > jnp.array(widths, longest.dtype), dtype=jnp.int32)
        return jax.lax.switch(index, [*branches, whole_width], part)

    whole = (minibatch, weights)
    if rows == size:
        return backward(whole)
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), whole)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(backward, first))
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, backward(part)), None), zeros, parts
    )
    return total


def _trimmed(part: tuple[Experience, Float[Array, "m T"]], width: int):
    """`part` without its response slots from `width` on."""
    cut = jax.tree.map(lambda x: x[:, :width] if x.ndim == 2 else x, part)

    def prompts(part):
        return part[0].rollout.prompt_tokens, part[0].rollout.prompt_mask

    return eqx.tree_at(prompts, cut, prompts(part))


def _loss(models, sides, part: Experience, weights, hyperparams, kl_coef, *, config, learner):
    """Weighted loss of these sides on a micro-batch; sums of what the metrics report."""
    rollout = part.rollout
    policy_hidden = cache(lambda: response_hidden(models["actor"], rollout))
    losses, sums = [], {}
    if "actor" in sides:
        logprobs, entropies = response_logprobs(
            models["actor"], rollout, policy_hidden(),
            temperature=hyperparams.temperature, chunk_size=config.logprob_chunk_size,
        )  # fmt: skip
        loss, sums = _actor_loss(
            logprobs, entropies, part, weights, hyperparams, kl_coef, config=config, learner=learner
        )
        losses.append(loss)
    if "critic" in sides:
        values = critic_values(models["critic"], rollout, policy_hidden)
        values, _ = response_values(values, rollout)
        loss = _critic_loss(values, part, weights, hyperparams, learner)
        losses.append(jnp.asarray(hyperparams.value_coef, loss.dtype) * loss)
        sums |= {"critic_loss": loss}
    return sum(losses), sums


def _clean(mask: Bool[Array, "m T"], like: Float[Array, "m T"]):
    """Zeros at masked places, before any exp or product: 0 * inf there would be NaN."""
    return lambda x: jnp.where(mask, x, 0.0).astype(like.dtype)


def _critic_loss(values, part: Experience, weights, hyperparams, learner):
    clean = _clean(part.rollout.mask, values)
    losses = learner.value_loss(
        clean(values), clean(part.old_values), clean(part.returns),
        value_clip=hyperparams.value_clip,
    )  # fmt: skip
    check_shape("what value_loss returns", losses, values.shape)
    return jnp.sum(clean(weights) * losses)


def _actor_loss(
    logprobs, entropies, part: Experience, weights, hyperparams, kl_coef, *, config, learner
):
    """The policy's weighted loss, entropy bonus and KL; sums of what the metrics report."""
    mask, clean = part.rollout.mask, _clean(part.rollout.mask, logprobs)
    weights, logprobs, old_logprobs = clean(weights), clean(logprobs), clean(part.old_logprobs)
    advantages = clean(part.advantages)
    clip = {
        "clip_ratio_low": hyperparams.clip_ratio_low,
        "clip_ratio_high": hyperparams.clip_ratio_high,
    }
    policy_losses = learner.policy_loss(
        logprobs, old_logprobs, advantages, **clip, dual_clip=hyperparams.dual_clip
    )
    check_shape("what policy_loss returns", policy_losses, logprobs.shape)
    log_ratios = logprobs - clean(part.reference_logprobs)
    steps = logprobs - old_logprobs
    weighted = {
        "actor_loss": jnp.sum(weights * policy_losses),
        "entropy_bonus": jnp.sum(weights * entropies),
    }
    entropy_coef = jnp.asarray(hyperparams.entropy_coef, weights.dtype)
    loss = weighted["actor_loss"] - entropy_coef * weighted["entropy_bonus"]
    if config.loss_kl is not None:
        weighted["kl_loss"] = jnp.sum(weights * config.loss_kl(log_ratios))
        loss = loss + kl_coef.astype(weights.dtype) * weighted["kl_loss"]
    sums = weighted | {
        "tokens": masked_sum(jnp.ones_like(logprobs), mask),
        "entropy": masked_sum(entropies, mask),
        "approx_kl": masked_sum(k3(-steps), mask),
        "clip_fraction": masked_sum(
            is_clipped(logprobs, old_logprobs, advantages, **clip).astype(logprobs.dtype), mask
        ),
        "clamped_log_ratios": masked_sum(
            (is_clamped(steps) | is_clamped(log_ratios)).astype(logprobs.dtype), mask
        ),
    }
    return loss, sums
