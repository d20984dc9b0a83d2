"""Stage 5b: experience -> new train state. Epochs x minibatches x micro-batches, by scan."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..config import Hyperparams, IterationConfig
from ..models.heads import ValueHead
from ..sharding import gather, shard_batch
from ..types import Experience, Metrics
from .gradient import minibatch_gradients
from .optimizer import optimizer_step
from .state import Learner, TrainState, current_kl_coef


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
) -> tuple[TrainState, Metrics]:
    """All optimizer steps of one iteration.

        loss = sum_t w_t (policy_loss_t + kl_coef k_t - entropy_coef H_t + value_coef value_loss_t)

    with the weights w of `config.reduction` over the whole minibatch, so that the sum over
    micro-batches is exact. Each model: clip by global norm, then x <- x - learning_rate *
    direction. A minibatch is skipped (parameters, moments and counts stay) where no token is valid
    and where a hyper-parameter, target, sum or gradient is not finite. A separate critic steps
    after the policy, so where only its own sum or gradient overflows, the policy has stepped.
    Source: Schulman et al. 2017, eq. 9 and algorithm 1, https://arxiv.org/abs/1707.06347.

    Args:
        state: donated by the compiled iteration.
        experience: B sequences.
        key: orders the minibatches; consumed.
        hyperparams: traced.
        config: epochs, minibatches, micro-batch size, reduction, KL in the loss.
        learner: optimizers and losses.

    Returns:
        (state, metrics): the iteration counter and `kl_coef` are left to the caller; metrics
        are means over valid tokens, or over the applied optimizer steps.

    Raises:
        ValueError: the batch does not divide into minibatches, or a minibatch into micro-batches.
    """
    order = minibatch_order(
        key, experience.rollout.sample_ids, config.num_epochs, config.num_minibatches
    )
    models, static = eqx.partition(
        {"actor": state.policy, "critic": state.critic}, eqx.is_inexact_array
    )
    kl_coef = current_kl_coef(state, hyperparams)
    # A head on the policy's trunk sends a gradient into it. Two models take their steps one after
    # the other, each inside a `cond`, so that only one gradient is in memory at a time.
    shared = isinstance(state.critic, ValueHead)
    passes = (("actor", "critic"),) if shared else (("actor",), ("critic",))

    def one_step(carry, rows: Int[Array, " M"]):
        minibatch = shard_batch(jax.tree.map(lambda x: x[rows], experience))

        def step(carry, sides: tuple[str, ...]):
            models, optimizer_states = carry
            gradients, sums = minibatch_gradients(
                gather(models), static, sides, minibatch, hyperparams, kl_coef,
                config=config, learner=learner,
            )  # fmt: skip
            return optimizer_step(models, optimizer_states, gradients, sums, hyperparams, learner)

        applied, sums = _is_ready(minibatch, hyperparams), {}
        for sides in passes:
            take = partial(step, sides=sides)
            carry, part, applied = jax.lax.cond(applied, take, partial(_left_out, take), carry)
            sums |= part
        return carry, sums

    optimizer_states = {
        "actor": (state.actor_optimizer_state, state.actor_remainder),
        "critic": (state.critic_optimizer_state, state.critic_remainder),
    }
    carry, sums = jax.lax.scan(one_step, (models, optimizer_states), order)
    float_type = kl_coef.dtype
    bad = [jnp.sum(~jnp.isfinite(x), dtype=float_type) for x in jax.tree.leaves(carry[0])]
    models = eqx.combine(carry[0], static)
    (actor, actor_remainder), (critic, critic_remainder) = carry[1]["actor"], carry[1]["critic"]
    state = TrainState(
        models["actor"], models["critic"], actor, critic, actor_remainder, critic_remainder,
        state.key, state.iteration, state.kl_coef,
    )  # fmt: skip
    return state, _metrics(sums) | {"nonfinite_parameters": jnp.sum(jnp.stack(bad))}


def _is_ready(minibatch: Experience, hyperparams: Hyperparams) -> Bool[Array, ""]:
    """Whether a minibatch has a token, and finite numbers wherever that is known beforehand.

    The policy's step is taken before the critic's loss is known, but not before its targets are.
    """
    mask = minibatch.rollout.mask
    targets = [jnp.where(mask, x, 0.0) for x in (minibatch.returns, minibatch.old_values)]
    finite = [jnp.all(jnp.isfinite(x)) for x in (*jax.tree.leaves(hyperparams), *targets)]
    return jnp.any(mask) & jnp.all(jnp.stack(finite))


def _left_out(step: Callable, carry):
    """What `step` returns where it is not taken: nothing moves, all sums are 0."""
    _, sums, _ = jax.eval_shape(step, carry)
    return carry, jax.tree.map(jnp.zeros_like, sums), jnp.array(False)


def _metrics(sums: dict[str, Float[Array, " steps"]]) -> Metrics:
    """Sums of every step -> means over valid tokens, or over the applied steps of that model."""
    total = {name: jnp.sum(values) for name, values in sums.items()}
    minibatches = len(sums["applied_critic"])
    applied = {side: total.pop(f"applied_{side}") for side in ("actor", "critic")}
    tokens = jnp.maximum(total.pop("tokens"), 1.0)
    counters = ("clamped_log_ratios",)
    per_token = ("entropy", "approx_kl", "clip_fraction")

    def reduced(name: str, value: Float[Array, ""]) -> Float[Array, ""]:
        if name in counters:
            return value
        if name in per_token:
            return value / tokens
        return value / jnp.maximum(applied["critic" if "critic" in name else "actor"], 1.0)

    metrics = {name: reduced(name, value) for name, value in total.items()}
    return metrics | {"skipped_minibatches": minibatches - applied["critic"]}
