"""Rollout, collect, learn and the whole step, at the named sizes: steady state after compiling.

`extra_info` has the compile time and the response tokens a second. By default the `tiny` size
runs; `--benchmark-only -k small` runs the larger one.
"""

import os
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from shapes import Case, case, even_fraction

from ppo_kernel.iteration import compile_iteration
from ppo_kernel.rollout import generate

SIZES = os.environ.get("BENCH_SIZES", "tiny").split(",")


@pytest.fixture(scope="module", params=SIZES)
def sized(request) -> Case:
    return case(request.param)


def measure(benchmark, sized: Case, run, tokens: int) -> None:
    """Compile on the first call, then time `run` to the end of its computation."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    benchmark.extra_info["compile_and_first_run_s"] = round(time.perf_counter() - start, 2)
    benchmark.pedantic(lambda: jax.block_until_ready(run()), rounds=7, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_s"] = round(tokens / benchmark.stats["median"], 1)


def response_tokens(sized: Case) -> int:
    return sized.shape.batch * sized.shape.response


@pytest.mark.benchmark(group="rollout")
def bench_rollout(benchmark, sized):
    run = eqx.filter_jit(generate)
    key = jax.random.key(0)
    generation = sized.config.generation
    measure(
        benchmark,
        sized,
        lambda: run(sized.policy, sized.prompts, key, config=generation).tokens,
        response_tokens(sized),
    )


@pytest.mark.benchmark(group="collect")
def bench_collect(benchmark, sized):
    collect = compile_iteration(config=sized.config).collect
    inputs = (sized.state, sized.policy, sized.prompts, sized.hyperparams)
    measure(benchmark, sized, lambda: collect(*inputs), response_tokens(sized))


@pytest.mark.benchmark(group="learn")
def bench_learn(benchmark, sized):
    compiled = compile_iteration(config=sized.config)
    collected = compiled.collect(sized.state, sized.policy, sized.prompts, sized.hyperparams)
    scores = even_fraction(collected.rollout)
    holder = [jax.tree.map(jnp.copy, sized.state)]

    def run():
        holder[0], metrics = compiled.learn(holder[0], collected, scores, sized.hyperparams)
        return holder[0].iteration, metrics

    measure(benchmark, sized, run, response_tokens(sized) * sized.shape.epochs)


@pytest.mark.benchmark(group="step")
def bench_step(benchmark, sized):
    step = compile_iteration(config=sized.config).step
    holder = [jax.tree.map(jnp.copy, sized.state)]

    def run():
        holder[0], metrics = step(
            holder[0], sized.policy, sized.prompts, sized.hyperparams, even_fraction
        )
        return holder[0].iteration, metrics

    measure(benchmark, sized, run, response_tokens(sized))
