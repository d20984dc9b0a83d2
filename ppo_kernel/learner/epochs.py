"""Stage 5b: experience -> new train state. Epochs x minibatches x micro-batches, by scan."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..config import Hyperparams, IterationConfig
from ..models.heads import ValueHead
from ..sharding import gather, shard_batch
from ..types import Experience, Metrics
from .gradient import LossSettings, minibatch_gradients
from .optimizer import ModelState, global_norm, optimizer_step
from .reports import join
from .state import Models, TrainState, current_kl_coef, iteration_keys


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
    hyperparams: Hyperparams,
    *,
    config: IterationConfig,
) -> tuple[TrainState, Metrics]:
    """All optimizer steps of one iteration; the state that it returns is at the next iteration.

        loss = sum_t w_t (policy_loss_t + kl_coef k_t - entropy_coef H_t + value_coef value_loss_t)

    with the weights w of `config.reduction` over the whole minibatch, so that the sum over
    micro-batches is exact. Each model: clip by global norm, then x <- x - learning_rate *
    direction. A minibatch is skipped (parameters, moments and counts stay) where no token is valid
    and where a hyper-parameter, target, term of the loss or gradient is not finite. A separate
    critic steps after the policy, so where only its own term or gradient overflows, the policy has
    stepped. Source: Schulman et al. 2017, eq. 9 and algorithm 1, https://arxiv.org/abs/1707.06347.

    Args:
        state: its key and iteration order the minibatches; donated by the compiled iteration.
        experience: B sequences.
        hyperparams: traced.
        config: epochs, minibatches, micro-batch size, reduction, KL in the loss.

    Returns:
        (state, metrics): the iteration is advanced, and `kl_coef` is the one that was used (see
        `adapt_kl_coef`); metrics are means over valid tokens, or over the applied optimizer steps.

    Raises:
        ValueError: the batch does not divide into minibatches, or a minibatch into micro-batches;
            a loss, its metrics or the weights have another shape than the mask.
    """
    order = minibatch_order(
        iteration_keys(state).update, experience.rollout.sample_ids,
        config.num_epochs, config.num_minibatches,
    )  # fmt: skip
    settings = LossSettings(hyperparams, current_kl_coef(state, hyperparams), config, state.learner)
    passes = _passes(state)

    def one_step(carry: Models, rows: Int[Array, " M"]):
        minibatch = shard_batch(jax.tree.map(lambda x: x[rows], experience))

        def step(carry: Models, trained: Models):
            return _step(carry, trained, state.frozen, minibatch, settings)

        applied, sums = _is_ready(minibatch, hyperparams), []
        for trained in passes:
            take = partial(step, trained=trained)
            carry, reported, applied = jax.lax.cond(applied, take, partial(_left_out, take), carry)
            sums.append((reported, applied))
        return carry, sums

    models, sums = jax.lax.scan(one_step, _model_states(state), order)
    state = _next_state(state, models, settings.kl_coef)
    skipped = jnp.sum(~sums[-1][1], dtype=state.kl_coef.dtype)
    counters = {"skipped_minibatches": skipped, "nonfinite_parameters": _nonfinite(state.trained)}
    return state, join(*(each.metrics(applied) for each, applied in sums), counters)


def _nonfinite(trained: Models) -> Float[Array, ""]:
    """How many parameters are NaN or infinite."""
    dtype = jnp.result_type(float)
    bad = [jnp.sum(~jnp.isfinite(x), dtype=dtype) for x in jax.tree.leaves(trained)]
    return jnp.sum(jnp.stack(bad))


def _passes(state: TrainState) -> tuple[Models, ...]:
    """Which models step together, one entry per backward pass: true for those that do."""
    if state.critic is None:
        return (Models(True, None),)
    # A head on the policy's trunk sends a gradient into it.
    if isinstance(state.critic, ValueHead):
        return (Models(True, True),)
    # Two models take their steps one after the other, each inside a `cond`, so that only one
    # gradient is in memory at a time.
    return Models(True, None), Models(None, True)


def _model_states(state: TrainState) -> Models:
    """What changes of each model, for the loop over optimizer steps."""
    critic = None
    if state.critic is not None:
        critic = ModelState(
            state.trained.critic, state.critic_optimizer_state, state.critic_remainder
        )
    policy = ModelState(state.trained.policy, state.actor_optimizer_state, state.actor_remainder)
    return Models(policy, critic)


def _next_state(state: TrainState, models: Models, kl_coef: Float[Array, ""]) -> TrainState:
    """The state after the last step of an iteration."""
    policy, critic = models.policy, models.critic
    return replace(
        state,
        trained=_parameters(models),
        actor_optimizer_state=policy.optimizer_state,
        actor_remainder=policy.remainder,
        critic_optimizer_state=None if critic is None else critic.optimizer_state,
        critic_remainder=None if critic is None else critic.remainder,
        iteration=state.iteration + 1,
        kl_coef=jnp.array(kl_coef),  # a copy: the state is consumed, the hyper-parameters are not
    )


def _parameters(models: Models) -> Models:
    critic = models.critic
    return Models(models.policy.parameters, None if critic is None else critic.parameters)


def _step(
    carry: Models, trained: Models, frozen: Models, minibatch: Experience, settings: LossSettings
):
    """(models after it, sums, whether it was applied) of one optimizer step of `trained`."""
    parameters = gather(_parameters(carry))
    models = eqx.combine(parameters, gather(frozen))
    chosen = Models(
        parameters.policy if trained.policy else None, parameters.critic if trained.critic else None
    )
    gradients, sums = minibatch_gradients(chosen, models, minibatch, settings)
    norms = {}
    if trained.policy:
        norms["grad_norm_actor"] = global_norm(gradients.policy)
    if trained.critic:
        norms["grad_norm_critic"] = global_norm(gradients.critic)
    terms = join(sums.terms, norms)
    applied = jnp.all(jnp.stack([jnp.isfinite(x) for x in terms.values()]))
    learner, hyperparams = settings.learner, settings.hyperparams
    policy, critic = carry.policy, carry.critic
    if trained.policy:
        policy = optimizer_step(
            policy, gradients.policy, norms["grad_norm_actor"], applied,
            hyperparams.actor, learner.actor_optimizer,
        )  # fmt: skip
    if trained.critic:
        critic = optimizer_step(
            critic, gradients.critic, norms["grad_norm_critic"], applied,
            hyperparams.critic, learner.critic_optimizer,
        )  # fmt: skip
    sums = jax.tree.map(lambda x: jnp.where(applied, x, 0.0), sums._replace(terms=terms))
    return Models(policy, critic), sums, applied


def _is_ready(minibatch: Experience, hyperparams: Hyperparams) -> Bool[Array, ""]:
    """Whether a minibatch has a token, and finite numbers wherever that is known beforehand.

    The policy's step is taken before the critic's loss is known, but not before its targets are.
    """
    mask = minibatch.rollout.mask
    targets = [jnp.where(mask, x, 0.0) for x in (minibatch.returns, minibatch.old_values)]
    finite = [jnp.all(jnp.isfinite(x)) for x in (*jax.tree.leaves(hyperparams), *targets)]
    return jnp.any(mask) & jnp.all(jnp.stack(finite))


def _left_out(step: Callable, carry: Models):
    """What `step` returns where it is not taken: nothing moves, all sums are 0."""
    _, sums, _ = jax.eval_shape(step, carry)
    return carry, jax.tree.map(jnp.zeros_like, sums), jnp.array(False)
