"""The iteration as one compiled program: the one place of the PPO path that jits and donates."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.core import Tracer
from jax.sharding import Mesh

from .advantages import gae
from .config import IterationConfig
from .iteration import collect, learn, ppo_iteration
from .learner.state import Learner, TrainState
from .rollout.prompts import check_prompts
from .sharding import at_rest, entered
from .types import AdvantageEstimator, Prompts


class CompiledIteration(NamedTuple):
    """The iteration, several in a row, and its two halves, compiled.

    `step`, `steps` and `learn` consume the state passed in. Pass the same reward object each time:
    a function that is made anew is another program.

    Attributes:
        step: (state, reference, prompts, hyperparams, reward) -> (state, metrics).
        steps: the same with S batches of prompts, stacked along a new first axis, -> (state,
            metrics [S]): S iterations by `jax.lax.scan` in one program, which waits for Python
            once and keeps its temporary memory from one to the next (bench/TRIED.md).
        collect: (state, reference, prompts, hyperparams) -> collected.
        learn: (state, collected, scores, hyperparams) -> (state, metrics).
        lower: same arguments as `step`, -> `jax.stages.Lowered`: HLO, memory and cost analysis.
    """

    step: Callable
    steps: Callable
    collect: Callable
    learn: Callable
    lower: Callable


def compile_iteration(
    *,
    config: IterationConfig,
    learner: Learner = Learner(),
    advantage_estimator: AdvantageEstimator = gae,
    mesh: Mesh | None = None,
) -> CompiledIteration:
    """Jit the iteration with donated state and fixed shardings; compiles at the first call.

    Args:
        config, learner, advantage_estimator: as in `ppo_iteration`.
        mesh: its devices share the batch, the models and the moments; None for one device. Arrays
            must be on it already: see `sharding.place`.

    Returns:
        The compiled functions; each compiles at its first call.

    Raises:
        ValueError: when called, what `ppo_iteration` raises; a state that was consumed or shares
            arrays with another argument; from `steps`, prompts not stacked.
    """
    second = {"config": config, "learner": learner, "advantage_estimator": advantage_estimator}

    # Equinox passes other arguments on to `jax.jit`, which its types do not say.
    filter_jit: Any = eqx.filter_jit
    jit = partial(filter_jit, compiler_options=compiler_options(mesh))

    def iterate(state, reference, prompts, hyperparams, reward):
        state, metrics = ppo_iteration(
            state, reference, prompts, hyperparams, reward=reward, **second
        )
        return at_rest(state), metrics

    # Equinox donates every argument but the first.
    @jit(donate="all-except-first")
    def step(inputs, state):
        return iterate(state, *inputs)

    @jit(donate="all-except-first")
    def steps(inputs, state):
        return _in_a_row(iterate, state, *inputs)

    @jit
    def first_half(state, reference, prompts, hyperparams):
        return collect(state, reference, prompts, hyperparams, config=config)

    @jit(donate="all-except-first")
    def second_half(inputs, state):
        state, metrics = learn(state, *inputs, **second)
        return at_rest(state), metrics

    def on_mesh(function: Callable) -> Callable:
        def call(*arguments):
            with entered(mesh):
                return function(*arguments)

        return call

    def consuming(function: Callable) -> Callable:
        def call(state, *inputs):
            _check_own(state, inputs)
            return function(inputs, state)

        return call

    def checking(function: Callable, *, stacked: bool = False) -> Callable:
        def call(state, reference, prompts, *others):
            check_prompts(prompts, state.policy, stacked=stacked)
            return function(state, reference, prompts, *others)

        return on_mesh(call)

    return CompiledIteration(
        step=checking(consuming(step)),
        steps=checking(consuming(steps), stacked=True),
        collect=checking(first_half),
        learn=on_mesh(consuming(second_half)),
        lower=on_mesh(lambda state, *inputs: step.lower(inputs, state).lowered),
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


def _check_own(state: TrainState, inputs: tuple) -> None:
    """Refuse a state that is not there any more, or that shares arrays with another argument."""

    def concrete(tree) -> list[jax.Array]:
        leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
        return [x for x in leaves if not isinstance(x, Tracer)]

    own = concrete(state)
    if any(x.is_deleted() for x in own):
        raise ValueError(
            "this state was consumed by an earlier call; go on with the state that it returned."
        )
    if {id(x) for x in own} & {id(x) for x in concrete(inputs)}:
        raise ValueError(
            "the state is consumed, but shares arrays with another argument; pass the models that "
            "Learner.init was given as reference or reward, or copies."
        )


def _in_a_row(iterate: Callable, state: TrainState, reference, batches: Prompts, *others):
    """(state, metrics [S]) of `iterate` over S batches of prompts."""
    arrays, static = eqx.partition(state, eqx.is_array)

    def body(arrays, prompts):
        state, metrics = iterate(eqx.combine(arrays, static), reference, prompts, *others)
        return eqx.filter(state, eqx.is_array), metrics

    arrays, metrics = jax.lax.scan(body, arrays, batches)
    return eqx.combine(arrays, static), metrics
