"""Each stage of an iteration compiled ahead of time, so that compiling is timed by itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ppo_kernel.evaluation import evaluate
from ppo_kernel.iteration import collect, learn, ppo_iteration
from ppo_kernel.program import compiler_options
from ppo_kernel.rollout.generate import generate
from ppo_kernel.sharding import at_rest, entered, gather, place

from .cases import Case, even_fraction
from .recording import memory_mb


@dataclass(frozen=True)
class Stage:
    """A stage ready to run.

    Attributes:
        run: computes once more and returns arrays to wait for; state is threaded through calls.
        compile_s: seconds of tracing, lowering and compiling.
        temporary_mb: what the program allocates besides arguments and results, 1e6 bytes; None
            where the backend does not say.
        program: the compiled program, for what else it says of itself.
    """

    run: Callable[[], object]
    compile_s: float
    temporary_mb: float | None
    program: jax.stages.Compiled


def prepare(name: str, case: Case) -> Stage:
    """Compile one of `STAGES` for a case.

    The state is donated as in `compile_iteration`, so a case serves one stage that learns.
    """
    with entered(case.mesh):
        return STAGES[name](case)


def _compiled(function: Callable, *arguments, donate: str = "none"):
    start = time.perf_counter()
    jit = eqx.filter_jit(function, donate=donate, compiler_options=compiler_options())
    compiled = jit.lower(*arguments).compile()
    seconds = round(time.perf_counter() - start, 2)
    program = compiled.compiled
    facts = {"compile_s": seconds, "temporary_mb": memory_mb(program), "program": program}
    return compiled, facts


def _stateless(function: Callable, *arguments) -> Stage:
    compiled, facts = _compiled(function, *arguments)
    return Stage(run=lambda: compiled(*arguments), **facts)


def _learning(function: Callable, case: Case, inputs) -> Stage:
    """(inputs, state) -> (state, metrics), with the state donated and passed on."""

    def advance(inputs, state):
        state, metrics = function(inputs, state)
        return at_rest(state), metrics

    compiled, facts = _compiled(advance, inputs, case.state, donate="all-except-first")
    holder = [case.state]

    def run():
        holder[0], metrics = compiled(inputs, holder[0])
        return holder[0].iteration, metrics

    return Stage(run=run, **facts)


def _rollout(case: Case) -> Stage:
    def run(policy, prompts, key):
        return generate(gather(policy), prompts, key, config=case.config.generation)

    return _stateless(run, case.state.policy, case.prompts, jax.random.key(0))


def _score(case: Case) -> Stage:
    rollout = eqx.filter_jit(generate)(
        place(case.state.policy, case.mesh, None), case.prompts, jax.random.key(0),
        config=case.config.generation,
    )  # fmt: skip

    def run(policy, reference, critic, rollout):
        models = gather((policy, reference, critic))
        return evaluate(*models, rollout, temperature=1.0)

    return _stateless(run, case.state.policy, case.reference, case.state.critic, rollout)


def _collect(case: Case) -> Stage:
    def run(*arguments):
        return collect(*arguments, config=case.config)

    return _stateless(run, case.state, case.reference, case.prompts, case.hyperparams)


def learning(case: Case, lengths: np.ndarray | None = None) -> Stage:
    """Stages 3 to 5 on one rollout, cut to these lengths where they are given."""
    collected = eqx.filter_jit(collect)(
        case.state, case.reference, case.prompts, case.hyperparams,
        config=case.config,
    )  # fmt: skip
    if lengths is not None:
        slots = jnp.arange(case.size.response)[None]
        rollout = replace(
            collected.rollout,
            lengths=jnp.asarray(lengths, jnp.int32),
            mask=slots < jnp.asarray(lengths)[:, None],
        )
        collected = replace(collected, rollout=rollout)

    def run(inputs, state):
        return learn(state, *inputs, config=case.config)

    return _learning(run, case, (collected, even_fraction(collected.rollout), case.hyperparams))


def _step(case: Case) -> Stage:
    def run(inputs, state):
        return ppo_iteration(state, *inputs, reward=even_fraction, config=case.config)

    return _learning(run, case, (case.reference, case.prompts, case.hyperparams))


STAGES: dict[str, Callable[[Case], Stage]] = {
    "rollout": _rollout,
    "score": _score,
    "collect": _collect,
    "learn": learning,
    "step": _step,
}
"""Name -> how to prepare it; the same names as in `work.WORK`."""
