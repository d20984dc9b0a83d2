"""Stage 5b: experience -> new train state. Epochs x minibatches x micro-batches, by scan."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from .config import Hyperparams, IterationConfig
from .learner import Learner, TrainState, optimizer_step, wide
from .losses import is_clipped
from .ops.kl import is_clamped, k3
from .ops.masked import masked_sum
from .scoring import critic_values, full_sequences, response_logprobs, response_values
from .sharding import Pin
from .types import Experience, Metrics


def minibatch_order(
    key: Key[Array, ""], sample_ids: Int[Array, " B"], num_epochs: int, num_minibatches: int
) -> Int[Array, "steps M"]:
    """Which sequences each optimizer step takes: a new permutation every epoch.

    A sequence's place is drawn from (key, epoch, sample id), so the minibatches hold the same
    samples in whatever order the batch comes.

    Args:
        key: consumed.
        sample_ids: distinct.
        num_epochs, num_minibatches: steps = num_epochs * num_minibatches.

    Returns:
        Rows of the batch, one line for each optimizer step.

    Raises:
        ValueError: the number of sequences is not a multiple of `num_minibatches`.
    """
    rows = sample_ids.shape[0]
    if rows % num_minibatches:
        raise ValueError(
            f"{rows} sequences do not divide into num_minibatches={num_minibatches}; "
            "choose a divisor of the batch."
        )

    def permutation(epoch: Int[Array, ""]) -> Int[Array, " B"]:
        epoch_key = jax.random.fold_in(key, epoch)
        draw = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(epoch_key, i)))
        return jnp.lexsort((sample_ids, draw(sample_ids)))

    order = jax.vmap(permutation)(jnp.arange(num_epochs))
    return order.reshape(num_epochs * num_minibatches, rows // num_minibatches)


def update(
    state: TrainState,
    experience: Experience,
    key: Key[Array, ""],
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
    learner: Learner = Learner(),
    pin: Pin = lambda tree: tree,
) -> tuple[TrainState, Metrics]:
    """All optimizer steps of one iteration.

        loss = sum_t w_t (policy_loss_t + kl_coef k_t - entropy_coef H_t + value_coef value_loss_t)

    with the weights w of `config.reduction` over the whole minibatch, so that the sum over
    micro-batches is exact. Each model: clip by global norm, then x <- x - learning_rate *
    direction. A minibatch is skipped (parameters, moments and counts stay) where a sum, gradient or
    learning rate is not finite, and where no token is valid.
    Source: Schulman et al. 2017, eq. 9 and algorithm 1.

    Args:
        state: donated by the compiled iteration.
        experience: B sequences.
        key: orders the minibatches; consumed.
        hyperparams: traced.
        config: epochs, minibatches, micro-batch size, reduction, KL in the loss.
        learner: optimizers and losses.
        pin: pins the leading axis of a tree to the batch axis of a mesh.

    Returns:
        (state, metrics): the iteration counter and `kl_coef` are left to the caller; metrics
        are means over valid tokens, or over the applied optimizer steps.

    Raises:
        ValueError: the batch does not divide into minibatches, or a minibatch into micro-batches.
    """
    order = minibatch_order(
        key, experience.rollout.sample_ids, config.num_epochs, config.num_minibatches
    )
    size = config.microbatch_size or order.shape[1]
    size = min(size, order.shape[1])
    if order.shape[1] % size:
        raise ValueError(
            f"a minibatch of {order.shape[1]} sequences does not divide into micro-batches of "
            f"{size}; choose a divisor."
        )
    models, static = eqx.partition((state.policy, state.critic), eqx.is_inexact_array)

    def one_step(carry, rows: Int[Array, " M"]):
        models, optimizer_states = carry
        minibatch = pin(jax.tree.map(lambda x: x[rows], experience))
        gradients, sums = _gradients(
            models, static, minibatch, hyperparams, state.kl_coef,
            config=config, learner=learner, size=size, pin=pin,
        )  # fmt: skip
        return optimizer_step(models, optimizer_states, gradients, sums, hyperparams, learner)

    optimizer_states = (state.actor_optimizer_state, state.critic_optimizer_state)
    carry, sums = jax.lax.scan(one_step, (models, optimizer_states), order)
    float_type = state.kl_coef.dtype
    bad = [jnp.sum(~jnp.isfinite(x), dtype=float_type) for x in jax.tree.leaves(carry[0])]
    (policy, critic), (actor_state, critic_state) = eqx.combine(carry[0], static), carry[1]
    state = TrainState(
        policy, critic, actor_state, critic_state, state.key, state.iteration, state.kl_coef
    )
    return state, _metrics(sums) | {"nonfinite_parameters": jnp.sum(jnp.stack(bad))}


def _gradients(models, static, minibatch, hyperparams, kl_coef, *, config, learner, size, pin):
    """Gradient of the minibatch loss and sums for the metrics, over its micro-batches."""
    if config.response_widths:
        # Neighbours of about one length share a micro-batch, so that it can be cut to their own.
        order = jnp.argsort(minibatch.rollout.lengths)
        minibatch = jax.tree.map(lambda x: x[order], minibatch)
    weights = config.reduction(minibatch.rollout.mask)

    def loss(models, part: tuple[Experience, Float[Array, "m T"]]):
        policy, critic = eqx.combine(models, static)
        return _loss(policy, critic, *part, hyperparams, kl_coef, config=config, learner=learner)

    def whole_width(part):
        gradients, sums = jax.grad(loss, has_aux=True)(models, pin(part))
        return wide(gradients), sums

    def backward(part):
        widths = [w for w in config.response_widths if w < weights.shape[1]]
        branches = [lambda part, w=w: whole_width(_trimmed(part, w)) for w in widths]
        if not branches:
            return whole_width(part)
        longest = jnp.max(part[0].rollout.lengths)
        index = jnp.sum(longest > jnp.array(widths, longest.dtype), dtype=jnp.int32)
        return jax.lax.switch(index, [*branches, whole_width], part)

    whole = (minibatch, weights)
    if len(weights) == size:
        return backward(whole)
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), whole)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(backward, first))
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


def _loss(policy, critic, part: Experience, weights, hyperparams, kl_coef, *, config, learner):
    """Weighted loss of a micro-batch; sums of what the metrics report."""
    rollout, mask = part.rollout, part.rollout.mask
    tokens, valid = full_sequences(rollout)
    hidden = policy.hidden(tokens, valid)
    logprobs, entropies = response_logprobs(
        policy, rollout, hidden,
        temperature=hyperparams.temperature, chunk_size=config.logprob_chunk_size,
    )  # fmt: skip
    values, _ = response_values(critic_values(critic, tokens, valid, lambda: hidden), rollout)

    def clean(x: Float[Array, "m T"]) -> Float[Array, "m T"]:
        # Before any exp or product: 0 * inf at a masked place would poison the gradient.
        return jnp.where(mask, x, 0.0).astype(logprobs.dtype)

    weights, logprobs, old_logprobs = clean(weights), clean(logprobs), clean(part.old_logprobs)
    advantages, values = clean(part.advantages), clean(values)
    clip = {
        "clip_ratio_low": hyperparams.clip_ratio_low,
        "clip_ratio_high": hyperparams.clip_ratio_high,
    }
    policy_losses = learner.policy_loss(
        logprobs, old_logprobs, advantages, **clip, dual_clip=hyperparams.dual_clip
    )
    value_losses = learner.value_loss(
        values, clean(part.old_values), clean(part.returns), value_clip=hyperparams.value_clip
    )
    log_ratios = logprobs - clean(part.reference_logprobs)
    steps = logprobs - old_logprobs
    weighted = {
        "actor_loss": jnp.sum(weights * policy_losses),
        "critic_loss": jnp.sum(weights * value_losses),
        "entropy_bonus": jnp.sum(weights * entropies),
    }
    loss = (
        weighted["actor_loss"]
        + jnp.asarray(hyperparams.value_coef, weights.dtype) * weighted["critic_loss"]
        - jnp.asarray(hyperparams.entropy_coef, weights.dtype) * weighted["entropy_bonus"]
    )
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


def _metrics(sums: dict[str, Float[Array, " steps"]]) -> Metrics:
    """Sums of every step -> means over valid tokens, or over the applied steps."""
    total = {name: jnp.sum(values) for name, values in sums.items()}
    steps, applied = sums["applied"].shape[0], total.pop("applied")
    tokens = jnp.maximum(total.pop("tokens"), 1.0)
    counters = ("clamped_log_ratios",)
    per_token = ("entropy", "approx_kl", "clip_fraction")

    def reduced(name: str, value: Float[Array, ""]) -> Float[Array, ""]:
        if name in counters:
            return value
        return value / (tokens if name in per_token else jnp.maximum(applied, 1.0))

    metrics = {name: reduced(name, value) for name, value in total.items()}
    return metrics | {"skipped_minibatches": steps - applied}
