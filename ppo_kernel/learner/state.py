"""What an update changes, and how: the train state, the optimizers and one step of them."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from ..config import Hyperparams
from ..losses import clipped_policy_loss, clipped_value_loss
from ..models.heads import ValueHead
from ..models.protocol import Critic, Policy
from ..ops.dtypes import upcast, upcast_tree
from ..types import PolicyLoss, ValueLoss


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
    given = upcast_tree(model)
    kept = {id(x) for x in jax.tree.leaves(given)}
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in kept else x, optimizer.init(given))


def _check_direction(name: str, optimizer: optax.GradientTransformation, model: PyTree) -> None:
    """Refuse what points against a gradient of ones: subtracted, it would go uphill."""
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        ones = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, upcast(x).dtype), model)
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


def _no_remainder(model: PyTree) -> PyTree | None:
    """Zeros for each parameter where some are narrower than float32."""
    narrow = any(x.dtype != upcast(x).dtype for x in jax.tree.leaves(model))
    return jax.tree.map(jnp.zeros_like, upcast_tree(model)) if narrow else None


def _trainable(model: PyTree) -> PyTree:
    return eqx.filter(model, eqx.is_inexact_array)
