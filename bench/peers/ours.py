"""ppo_kernel: the whole step as one program, and the rollout by itself.

With `--steps-a-call 4` a round is four steps in one program; what it reports is for one of them.
"""

import argparse
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from bench.cases import build, even_fraction
from bench.peers.common import Rounds, flags, prompt_ids
from bench.sizes import Size
from ppo_kernel.iteration import compile_iteration
from ppo_kernel.rollout import generate
from ppo_kernel.types import Prompts


def timed(call):
    """(result, seconds to the end of its computation)."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def main(size: Size, warmup: int, rounds: int, steps: int) -> None:
    """Warm up, then one rollout and one call a round; the state goes on from call to call."""
    case = build(size)
    compiled = compile_iteration(config=case.config)
    sample = eqx.filter_jit(lambda *a: generate(*a, config=case.config.generation).tokens)
    ids = prompt_ids(size, (warmup + rounds) * steps)
    turns, state = Rounds(warmup), case.state
    for tokens in jnp.asarray(ids).reshape(-1, steps, *ids.shape[1:]):
        sample_ids = jnp.broadcast_to(case.prompts.sample_ids, tokens.shape[:2])
        batches = Prompts(tokens, jnp.ones_like(tokens, bool), sample_ids)
        first = jax.tree.map(lambda x: x[0], batches)
        inputs = (case.hyperparams, even_fraction)
        turns.begin()
        _, rollout_s = timed(lambda p=first: sample(case.reference, p, jax.random.key(0)))
        if steps == 1:
            call = partial(compiled.step, state, case.reference, first, *inputs)
        else:
            call = partial(compiled.steps, state, case.reference, batches, *inputs)
        (state, _), seconds = timed(call)
        turns.end(step_s=seconds / steps, rollout_s=rollout_s, call_s=seconds)


if __name__ == "__main__":
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--steps-a-call", type=int, default=1)
    parsed = flags(extra)
    main(parsed.size, parsed.warmup, parsed.rounds, parsed.steps_a_call)
