"""ppo_kernel: the whole step as one program, and the rollout by itself."""

import time

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


def main(size: Size, warmup: int, rounds: int) -> None:
    """Warm up, then one rollout and one step a round; the state goes on from step to step."""
    case = build(size)
    step = compile_iteration(config=case.config).step
    sample = eqx.filter_jit(lambda *a: generate(*a, config=case.config.generation).tokens)
    ids = jnp.asarray(prompt_ids(size, warmup + rounds))
    turns, state = Rounds(warmup), case.state
    for tokens in ids:
        prompts = Prompts(tokens, jnp.ones_like(tokens, bool), case.prompts.sample_ids)
        turns.begin()
        _, rollout_s = timed(lambda p=prompts: sample(case.reference, p, jax.random.key(0)))
        (state, _), step_s = timed(
            lambda p=prompts, s=state: step(s, case.reference, p, case.hyperparams, even_fraction)
        )
        turns.end(step_s=step_s, rollout_s=rollout_s)


if __name__ == "__main__":
    parsed = flags()
    main(parsed.size, parsed.warmup, parsed.rounds)
