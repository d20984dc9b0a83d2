"""What an update changes, and how: the train state, the optimizers and one step of them."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from .config import Hyperparams
from .losses import clipped_policy_loss, clipped_value_loss
from .models.base import Critic, Policy
from .models.heads import ValueHead
from .ops.masked import at_least_float32
from .types import PolicyLoss, ValueLoss


class TrainState(eqx.Module):
    """Everything an iteration changes, and nothing else.

    Attributes:
        policy, critic: the models as they are now.
        actor_optimizer_state, critic_optimizer_state: moments, in at least float32.
        actor_remainder, critic_remainder: what rounding took from parameters narrower than float32;
            None for wider ones.
        key: never consumed: the noise of an iteration comes from (key, iteration).
        iteration: how many are done.
        kl_coef: the controller's coefficient; follows `Hyperparams.kl_coef` without a target.
    """

    policy: Policy
    critic: Critic | ValueHead
    actor_optimizer_state: PyTree
    critic_optimizer_state: PyTree
    actor_remainder: PyTree | None
    critic_remainder: PyTree | None
    key: Key[Array, "*runs"]
    iteration: Int[Array, "*runs"]
    kl_coef: Float[Array, "*runs"]


@dataclass(frozen=True)
class Learner:
    """The functions that the update is made of; swapping one is passing another.

    Attributes:
        actor_optimizer, critic_optimizer: optax transformations that give a *direction*, such
            as `optax.scale_by_adam()`: sign and learning rate are applied from `Hyperparams`.
        policy_loss, value_loss: see `types.PolicyLoss` and `types.ValueLoss`.
    """

    actor_optimizer: optax.GradientTransformation = optax.scale_by_adam(eps=1e-8)
    critic_optimizer: optax.GradientTransformation = optax.scale_by_adam(eps=1e-8)
    policy_loss: PolicyLoss = clipped_policy_loss
    value_loss: ValueLoss = clipped_value_loss

    def init(
        self,
        policy: Policy,
        critic: Critic | ValueHead,
        key: Key[Array, ""],
        hyperparams: Hyperparams,
    ) -> TrainState:
        """The state before the first iteration, on copies: an iteration donates its state.

        Args:
            policy, critic: the models to train; on a mesh already, where there is one (see
                `sharding.place`): moments then lie as they do.
            key: of the whole run, copied into the state.
            hyperparams: gives the first KL coefficient.

        Returns:
            A `TrainState` with fresh moments, iteration 0.

        Raises:
            ValueError: an optimizer that applies its own learning rate and sign.
        """
        _check_direction("actor_optimizer", self.actor_optimizer, _trainable(policy))
        _check_direction("critic_optimizer", self.critic_optimizer, _trainable(critic))

        def copy(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, tree)

        return TrainState(
            policy=copy(policy),
            critic=copy(critic),
            actor_optimizer_state=_moments(self.actor_optimizer, _trainable(policy)),
            critic_optimizer_state=_moments(self.critic_optimizer, _trainable(critic)),
            actor_remainder=_no_remainder(_trainable(policy)),
            critic_remainder=_no_remainder(_trainable(critic)),
            key=jnp.copy(key),
            iteration=jnp.zeros((), jnp.int32),
            kl_coef=jnp.array(hyperparams.kl_coef),
        )


def _moments(optimizer: optax.GradientTransformation, model: PyTree) -> PyTree:
    """The optimizer's first state. Some keep the parameters they are given: those are copied."""
    given = wide(model)
    kept = {id(x) for x in jax.tree.leaves(given)}
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in kept else x, optimizer.init(given))


def _check_direction(name: str, optimizer: optax.GradientTransformation, model: PyTree) -> None:
    """Refuse what points against a gradient of ones: subtracted, it would go uphill."""
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        ones = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, at_least_float32(x).dtype), model)
        direction, _ = optimizer.update(ones, optimizer.init(ones), ones)
        along = sum(float(jnp.sum(x)) for x in jax.tree.leaves(direction))
    if along < 0.0:
        raise ValueError(
            f"{name} applies a learning rate and a sign of its own, as optax.adam(1e-5) does; pass "
            "what gives the direction alone, such as optax.scale_by_adam(). The rates are those of "
            "Hyperparams."
        )


def current_kl_coef(state: TrainState, hyperparams: Hyperparams) -> Float[Array, "*runs"]:
    """The weight of the KL penalty in this iteration.

    Args:
        state: has the controller's coefficient, which counts where there is a `kl_target`.
        hyperparams: has the fixed one.

    Returns:
        Rank 0, of the state's type.
    """
    if hyperparams.kl_target is None:
        return jnp.asarray(hyperparams.kl_coef, state.kl_coef.dtype)
    return state.kl_coef


def optimizer_step(
    models: dict[str, PyTree],
    optimizer_states: dict[str, PyTree],
    gradients: dict[str, PyTree],
    sums: dict[str, Float[Array, ""]],
    hyperparams: Hyperparams,
    learner: Learner,
) -> tuple[tuple[dict, dict], dict[str, Float[Array, ""]], Bool[Array, ""]]:
    """One optimizer step of the models that have a gradient, or none where a number is not finite.

        g <- g min(1, max_grad_norm / |g|),   x <- x - learning_rate * direction(g)

    Parameters narrower than float32 round off most of such steps. What they could not hold is kept
    and added to the next one: x + remainder is the parameter in float32 (Kahan's sum, as in Zamirai
    et al. 2020).

    Args:
        models: of "actor" and "critic".
        optimizer_states: of each, moments and remainder.
        gradients: of one of them, or of both.
        sums: of the minibatch, for the metrics.
        hyperparams: learning rates and bounds of the gradient norms.
        learner: the optimizers.

    Returns:
        ((models, optimizer states), sums, applied): `grad_norm_actor` and `applied_actor` (1), or
        those of the critic, are added to the sums; all are 0 where the step was left out.
    """
    norms = {side: optax.tree.norm(gradient) for side, gradient in gradients.items()}
    applied = jnp.all(jnp.stack([jnp.isfinite(x) for x in (*norms.values(), *sums.values())]))
    for side, gradient in gradients.items():
        norm, limit = norms[side], getattr(hyperparams, f"max_grad_norm_{side}")
        if limit is not None:
            scale = jnp.minimum(1.0, jnp.asarray(limit, norm.dtype) / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda g, scale=scale: g * scale.astype(g.dtype), gradient)
        optimizer = getattr(learner, f"{side}_optimizer")
        rate = getattr(hyperparams, f"learning_rate_{side}")
        old = models[side], optimizer_states[side]
        model, state = _select(applied, _moved(*old, gradient, rate, optimizer), old)
        models, optimizer_states = models | {side: model}, optimizer_states | {side: state}
    sums = sums | {f"grad_norm_{side}": norm for side, norm in norms.items()}
    sums |= {f"applied_{side}": jnp.ones_like(norm) for side, norm in norms.items()}
    sums = _select(applied, sums, jax.tree.map(jnp.zeros_like, sums))
    return (models, optimizer_states), sums, applied


def _moved(model, state, gradient, rate, optimizer):
    """The model after x <- x - rate * direction, and the optimizer's new state and remainder."""
    moments, remainder = state
    exact = wide(model) if remainder is None else jax.tree.map(jnp.add, wide(model), remainder)
    # Optax mixes types on purpose; a caller's strict promotion is for our own code.
    with jax.numpy_dtype_promotion("standard"):
        direction, moments = optimizer.update(gradient, moments, exact)
    exact = jax.tree.map(lambda x, d: x - jnp.asarray(rate, d.dtype) * d, exact, direction)
    if remainder is not None:
        remainder = jax.tree.map(lambda x, old: x - _rounded(x, old.dtype), exact, model)
    return jax.tree.map(lambda x, old: x.astype(old.dtype), exact, model), (moments, remainder)


def _rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """`x` as `dtype` holds it. XLA may leave out a cast there and back, but never this."""
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kept.nexp, kept.nmant)


def _no_remainder(model: PyTree) -> PyTree | None:
    """Zeros for each parameter where some are narrower than float32."""
    narrow = any(x.dtype != at_least_float32(x).dtype for x in jax.tree.leaves(model))
    return jax.tree.map(jnp.zeros_like, wide(model)) if narrow else None


def _select(condition: Bool[Array, ""], if_true: PyTree, if_false: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def _trainable(model: PyTree) -> PyTree:
    return eqx.filter(model, eqx.is_inexact_array)


def wide(tree: PyTree) -> PyTree:
    """`tree` in at least float32, as gradients and moments are kept."""
    return jax.tree.map(at_least_float32, tree)
