"""What an update changes, and how: the train state, and the functions that a state is made with."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from ..config import Hyperparams
from ..functions import PolicyLoss, ValueLoss
from ..losses import ppo_policy_loss, ppo_value_loss
from ..models.heads import ValueHead
from ..models.protocol import Critic, Policy
from ..ops.dtypes import upcast, upcast_tree


class Models(eqx.Module):
    """A policy and its critic, or something of each: parameters, gradients, bools.

    Attributes:
        policy: the policy's.
        critic: the critic's, or None where there is none.
    """

    policy: PyTree
    critic: PyTree


@runtime_checkable
class TrainableFilter(Protocol):
    """Which leaves are trained, as Equinox filters a tree."""

    def __call__(self, models: Models, /) -> PyTree:
        """True or false for every leaf of `models`, or for a whole subtree at a time.

        Only inexact arrays train, whatever the filter says.
        """
        ...


def every_parameter(models: Models) -> PyTree:
    """The filter that trains every inexact array of both models."""
    return jax.tree.map(eqx.is_inexact_array, models)


@dataclass(frozen=True)
class Learner:
    """The functions that the update is made of; swapping one is passing another.

    Attributes:
        actor_optimizer, critic_optimizer: optax transformations that give a *direction*, such
            as `optax.scale_by_adam()`: sign and learning rate are applied from `Hyperparams`.
        policy_loss, value_loss: see `functions.PolicyLoss` and `functions.ValueLoss`.
        trainable: which leaves are trained, see `TrainableFilter`.
    """

    actor_optimizer: optax.GradientTransformation = optax.scale_by_adam(eps=1e-8)
    critic_optimizer: optax.GradientTransformation = optax.scale_by_adam(eps=1e-8)
    policy_loss: PolicyLoss = ppo_policy_loss
    value_loss: ValueLoss = ppo_value_loss
    trainable: TrainableFilter = every_parameter

    def init(
        self,
        policy: Policy,
        critic: Critic | ValueHead | None,
        key: Key[Array, ""],
        hyperparams: Hyperparams,
    ) -> "TrainState":
        """The state before the first iteration.

        Its trained leaves are copies, because an iteration donates them. Its frozen leaves are
        those of the arguments: where `policy` is the reference too, both are one array.

        Args:
            policy: the policy to train; on a mesh already, where there is one (see
                `sharding.place`): moments then lie as its parameters do.
            critic: a model, a `ValueHead` on the policy's trunk, or None: then every value is 0,
                and nothing of a critic is computed or stored.
            key: of the whole run, copied into the state.
            hyperparams: gives the first KL coefficient.

        Returns:
            A `TrainState` with fresh moments, iteration 0.

        Raises:
            ValueError: an optimizer that applies its own learning rate and sign.
        """
        trained, frozen = self.partition(Models(policy, critic))
        _check_direction("actor_optimizer", self.actor_optimizer, trained.policy)
        _check_direction("critic_optimizer", self.critic_optimizer, trained.critic)
        return TrainState(
            trained=jax.tree.map(jnp.copy, trained),
            frozen=frozen,
            actor_optimizer_state=_moments(self.actor_optimizer, trained.policy),
            critic_optimizer_state=_moments(self.critic_optimizer, trained.critic),
            actor_remainder=_no_remainder(trained.policy),
            critic_remainder=_no_remainder(trained.critic),
            key=jnp.copy(key),
            iteration=jnp.zeros((), jnp.int32),
            kl_coef=jnp.array(hyperparams.kl_coef),
            learner=self,
        )

    def partition(self, models: Models) -> tuple[Models, Models]:
        """(trained leaves, all other leaves) of the models, None elsewhere."""
        chosen = eqx.filter(models, self.trainable(models))
        return eqx.partition(
            models, jax.tree.map(eqx.is_inexact_array, chosen, is_leaf=lambda x: x is None)
        )


class TrainState(eqx.Module):
    """Everything an iteration changes, and the frozen rest of the models.

    Attributes:
        trained: the parameters that change.
        frozen: all other leaves of policy and critic. `compile_iteration` does not consume them.
        actor_optimizer_state, critic_optimizer_state: moments, in at least float32; None without
            a critic.
        actor_remainder, critic_remainder: what rounding took from parameters narrower than float32;
            None for wider ones.
        key: never consumed: the noise of an iteration comes from (key, iteration).
        iteration: how many updates are done.
        kl_coef: the controller's coefficient; follows `Hyperparams.kl_coef` without a target.
        learner: the functions that the state was made with, and that update it.
    """

    trained: Models
    frozen: Models
    actor_optimizer_state: PyTree
    critic_optimizer_state: PyTree
    actor_remainder: PyTree | None
    critic_remainder: PyTree | None
    key: Key[Array, "*runs"]
    iteration: Int[Array, "*runs"]
    kl_coef: Float[Array, "*runs"]
    learner: Learner = eqx.field(static=True)

    def detached(self) -> "TrainState":
        """The state without its frozen leaves: what a step consumes, and a checkpoint holds."""
        return replace(self, frozen=Models(None, None))

    @property
    def models(self) -> Models:
        """Policy and critic as they are now, whole."""
        return eqx.combine(self.trained, self.frozen)

    @property
    def policy(self) -> Policy:
        """The policy as it is now, whole."""
        return self.models.policy

    @property
    def critic(self) -> Critic | ValueHead | None:
        """The critic as it is now, whole."""
        return self.models.critic


class IterationKeys(NamedTuple):
    """The keys of one iteration.

    Attributes:
        rollout: for `generate`.
        update: orders the minibatches; `update` takes it by itself.
    """

    rollout: Key[Array, ""]
    update: Key[Array, ""]


def iteration_keys(state: TrainState) -> IterationKeys:
    """The keys of this iteration, of (state.key, state.iteration).

    `update` consumes its own and advances the iteration, so the next keys are others.

    Args:
        state: has the key of the run, and the iteration.

    Returns:
        `IterationKeys`.
    """
    rollout_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.iteration))
    return IterationKeys(rollout_key, update_key)


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


def _moments(optimizer: optax.GradientTransformation, parameters: PyTree) -> PyTree:
    """The optimizer's first state. Some keep the parameters they are given: those are copied."""
    if parameters is None:
        return None
    given = upcast_tree(parameters)
    kept = {id(x) for x in jax.tree.leaves(given)}
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in kept else x, optimizer.init(given))


def _check_direction(
    name: str, optimizer: optax.GradientTransformation, parameters: PyTree
) -> None:
    """Refuse what points against a gradient of ones: subtracted, it would go uphill."""
    if parameters is None:
        return
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        ones = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, upcast(x).dtype), parameters)
        direction, _ = optimizer.update(ones, optimizer.init(ones), ones)
        along = sum(float(jnp.sum(x)) for x in jax.tree.leaves(direction))
    if along < 0.0:
        raise ValueError(
            f"{name} applies a learning rate and a sign of its own, as optax.adam(1e-5) does; pass "
            "what gives the direction alone, such as optax.scale_by_adam(). The rates are those of "
            "Hyperparams."
        )


def _no_remainder(parameters: PyTree) -> PyTree | None:
    """Zeros for each parameter where some are narrower than float32."""
    narrow = any(x.dtype != upcast(x).dtype for x in jax.tree.leaves(parameters))
    return jax.tree.map(jnp.zeros_like, upcast_tree(parameters)) if narrow else None
