"""The iteration as one compiled program: the one place of the PPO path that jits and donates."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from .advantages import gae, whitened
from .config import Hyperparams, IterationConfig
from .donation import Distinct, check_learner, check_own
from .functions import AdvantageEstimator, RewardFn
from .iteration import Collected, collect, learn, ppo_iteration
from .learner.state import Learner, TrainState
from .models.heads import ValueHead
from .models.protocol import Critic, Policy
from .rollout.prompts import check_prompts
from .sharding import at_rest, entered
from .types import Metrics, Prompts


def compile_iteration(
    *,
    config: IterationConfig,
    learner: Learner = Learner(),
    advantage_estimator: AdvantageEstimator = whitened(gae),
    mesh: Mesh | None = None,
) -> "CompiledIteration":
    """Jit the iteration with donated state and fixed shardings; compiles at the first call.

    Args:
        config, advantage_estimator: as in `ppo_iteration`.
        learner: makes the state, and updates it.
        mesh: its devices share the batch, the models and the moments; None for one device. Arrays
            must be on it already: see `sharding.place`.

    Returns:
        Methods `init`, `step`, `steps`, `collect`, `learn` and `lower`.
    """
    return CompiledIteration(config, learner, advantage_estimator, mesh)


class CompiledIteration:
    """The iteration, several in a row, and its two halves, compiled; from `compile_iteration`.

    `step`, `steps` and `learn` consume the trained part of the state passed in. Frozen arrays that
    another argument has too, such as the reference's, are one argument of the program.

    Args:
        config, learner, advantage_estimator, mesh: as in `compile_iteration`.
    """

    def __init__(
        self,
        config: IterationConfig,
        learner: Learner,
        advantage_estimator: AdvantageEstimator,
        mesh: Mesh | None,
    ):
        self._learner, self._mesh = learner, mesh
        self._rewards: dict[CodeType, RewardFn] = {}
        second = {"config": config, "advantage_estimator": advantage_estimator}
        # Equinox passes other arguments on to `jax.jit`, which its types do not say.
        filter_jit: Any = eqx.filter_jit
        jit = partial(filter_jit, compiler_options=compiler_options(mesh))

        def iterate(state, reference, prompts, hyperparams, reward):
            state, metrics = ppo_iteration(
                state, reference, prompts, hyperparams, reward=reward, **second
            )
            return at_rest(state), metrics

        def second_half(state, collected, scores, hyperparams):
            state, metrics = learn(state, collected, scores, hyperparams, **second)
            return at_rest(state), metrics

        def consuming(function: Callable):
            # Equinox donates every argument but the first.
            @jit(donate="all-except-first")
            def program(inputs: Distinct, consumed: TrainState):
                frozen, *others = inputs.tree
                state, metrics = function(replace(consumed, frozen=frozen), *others)
                return state.detached(), metrics

            return program

        @jit
        def first_half(inputs: Distinct):
            return collect(*inputs.tree, config=config)

        self._step, self._learn = consuming(iterate), consuming(second_half)
        self._steps = consuming(partial(_in_a_row, iterate))
        self._collect = first_half

    def init(
        self,
        policy: Policy,
        critic: Critic | ValueHead | None,
        key: Key[Array, ""],
        hyperparams: Hyperparams,
    ) -> TrainState:
        """The state before the first iteration, by `Learner.init`.

        Args:
            policy, critic, key, hyperparams: as there.

        Returns:
            A state for `step`.
        """
        return self._learner.init(policy, critic, key, hyperparams)

    def step(
        self,
        state: TrainState,
        reference: Policy,
        prompts: Prompts,
        hyperparams: Hyperparams,
        reward: RewardFn,
    ) -> tuple[TrainState, Metrics]:
        """One iteration, by `ppo_iteration`.

        Args:
            state: consumed.
            reference, prompts, hyperparams: as there.
            reward: the same object each time; a function that is made anew is another program.

        Returns:
            (state, metrics).

        Raises:
            ValueError: what `ppo_iteration` raises; a state that was consumed, that another learner
                made, or that shares trained arrays with another argument.
        """
        self._note(reward)
        check_prompts(prompts, state.policy)
        return self._consume(self._step, state, reference, prompts, hyperparams, reward)

    def steps(
        self,
        state: TrainState,
        reference: Policy,
        batches: Prompts,
        hyperparams: Hyperparams,
        reward: RewardFn,
    ) -> tuple[TrainState, dict[str, Float[Array, " S"]]]:
        """S iterations by `jax.lax.scan` in one program.

        It waits for Python once, and keeps its temporary memory between iterations.

        Args:
            state, reference, hyperparams, reward: as in `step`.
            batches: S batches of prompts, stacked along a new first axis.

        Returns:
            (state, metrics [S]).

        Raises:
            ValueError: what `step` raises; prompts that are not stacked.
        """
        self._note(reward)
        check_prompts(batches, state.policy, stacked=True)
        return self._consume(self._steps, state, reference, batches, hyperparams, reward)

    def collect(
        self, state: TrainState, reference: Policy, prompts: Prompts, hyperparams: Hyperparams
    ) -> Collected:
        """The first half of an iteration, by `iteration.collect`.

        Args:
            state: not consumed.
            reference, prompts, hyperparams: as there.

        Returns:
            What `learn` takes.
        """
        check_prompts(prompts, state.policy)
        with entered(self._mesh):
            return self._collect(Distinct.of((state, reference, prompts, hyperparams)))

    def learn(
        self, state: TrainState, collected: Collected, scores: PyTree, hyperparams: Hyperparams
    ) -> tuple[TrainState, Metrics]:
        """The second half of an iteration, by `iteration.learn`.

        Args:
            state: consumed.
            collected, scores, hyperparams: as there.

        Returns:
            (state, metrics).

        Raises:
            ValueError: what `iteration.learn` and `step` raise.
        """
        return self._consume(self._learn, state, collected, scores, hyperparams)

    def lower(
        self,
        state: TrainState,
        reference: Policy,
        prompts: Prompts,
        hyperparams: Hyperparams,
        reward: RewardFn,
    ) -> jax.stages.Lowered:
        """The program of `step`, lowered: its HLO, memory and cost analysis.

        Args:
            state, reference, prompts, hyperparams, reward: as in `step`; nothing is consumed.

        Returns:
            What `jax.jit(...).lower` gives.

        Raises:
            ValueError: what `step` raises.
        """
        inputs, consumed = self._split(state, reference, prompts, hyperparams, reward)
        with entered(self._mesh):
            return self._step.lower(inputs, consumed).lowered

    def _split(self, state: TrainState, *inputs: PyTree) -> "tuple[Distinct, TrainState]":
        """The arguments of a program: what stays, and what it consumes."""
        consumed = state.detached()
        check_learner(state.learner, self._learner)
        check_own(consumed, (state.frozen, *inputs))
        return Distinct.of((state.frozen, *inputs)), consumed

    def _consume(self, program: Callable, state: TrainState, *inputs: PyTree):
        distinct, consumed = self._split(state, *inputs)
        with entered(self._mesh):
            after, metrics = program(distinct, consumed)
        return replace(after, frozen=state.frozen), metrics

    def _note(self, reward: RewardFn) -> None:
        """Warn of a function that is made anew each time, as a lambda inside a loop is."""
        if isinstance(reward, FunctionType):
            first = self._rewards.setdefault(reward.__code__, reward)
            if first is not reward:
                warnings.warn(
                    f"reward {reward!r} is another object than {first!r}, made by the same code, so"
                    " the iteration is compiled anew; make it once, before the loop.",
                    stacklevel=3,
                )


def compiler_options(mesh: Mesh | None = None) -> dict[str, bool | str]:
    """What `compile_iteration` asks of XLA, for `jax.jit(..., compiler_options=...)`.

    By default XLA leaves out roundings to bfloat16 where it fuses, in one place and not in another,
    so the same tokens get other log-probabilities in the rollout than in the update. Here it rounds
    as the program says, and they are equal. On CPUs the other options save memory, 19 % of all for
    a model of 0.5 B parameters: by default XLA copies the moments, because the new parameters read
    the old ones too, and orders independent operations for concurrency, so that more arrays are
    alive at a time.

    Args:
        mesh: whose devices the program is for; None for the default device.

    Returns:
        Names and values of XLA's options.
    """
    rounding: dict[str, bool | str] = {"xla_allow_excess_precision": False}
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "cpu":
        return rounding
    return rounding | {
        "xla_cpu_copy_insertion_use_region_analysis": True,
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    }


def _in_a_row(iterate: Callable, state: TrainState, reference, batches: Prompts, *others):
    """(state, metrics [S]) of `iterate` over S batches of prompts; frozen leaves stay outside."""
    arrays, static = eqx.partition(state.detached(), eqx.is_array)

    def body(arrays, prompts):
        whole = replace(eqx.combine(arrays, static), frozen=state.frozen)
        after, metrics = iterate(whole, reference, prompts, *others)
        return eqx.filter(after.detached(), eqx.is_array), metrics

    arrays, metrics = jax.lax.scan(body, arrays, batches)
    return eqx.combine(arrays, static), metrics
