"""ppo_kernel: the whole step as one program; with `--rollouts` the rollout, and nothing else.

With `--steps-a-call 4` a round is four steps in one program; what it reports is for one of them.
"""

import argparse
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bench.cases import build, even_fraction, random_policy, settings
from bench.peers.common import Rounds, flags, prompt_ids
from bench.sizes import Size
from ppo_kernel.program import compile_iteration
from ppo_kernel.rollout.generate import generate
from ppo_kernel.types import Prompts


def timed(call):
    """(result, seconds to the end of its computation)."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def step_by_step(size: Size, warmup: int, rounds: int, steps: int) -> None:
    """One call a round; the state goes on from call to call."""
    case = build(size)
    compiled = compile_iteration(config=case.config)
    ids = prompt_ids(size, (warmup + rounds) * steps)
    run = compiled.step if steps == 1 else compiled.steps
    batches = ids if steps == 1 else ids.reshape(-1, steps, *ids.shape[1:])
    turns, state = Rounds(warmup), case.state
    for tokens in jnp.asarray(batches):
        prompts = as_prompts(tokens)
        turns.begin()
        call = partial(run, state, case.reference, prompts, case.hyperparams, even_fraction)
        (state, _), seconds = timed(call)
        turns.end(step_s=seconds / steps, call_s=seconds)


def rollouts(size: Size, warmup: int, rounds: int) -> None:
    """One rollout a round; no critic and no moments lie beside the policy."""
    policy, (config, _), turns = random_policy(size), settings(size), Rounds(warmup)
    sample = eqx.filter_jit(lambda *a: generate(*a, config=config.generation).tokens)
    for tokens in jnp.asarray(prompt_ids(size, warmup + rounds)):
        prompts = as_prompts(tokens)
        turns.begin()
        _, seconds = timed(partial(sample, policy, prompts, jax.random.key(0)))
        turns.end(rollout_s=seconds)


def as_prompts(tokens: Int[Array, "*steps N P"]) -> Prompts:
    """Batches of full prompts, those of each numbered from 0."""
    sample_ids = jnp.broadcast_to(jnp.arange(tokens.shape[-2]), tokens.shape[:-1])
    return Prompts(tokens, jnp.ones_like(tokens, bool), sample_ids)


if __name__ == "__main__":
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--steps-a-call", type=int, default=1)
    extra.add_argument("--rollouts", action="store_true")
    parsed = flags(extra)
    if parsed.rollouts:
        rollouts(parsed.size, parsed.warmup, parsed.rounds)
    else:
        step_by_step(parsed.size, parsed.warmup, parsed.rounds, parsed.steps_a_call)
