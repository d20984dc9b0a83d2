"""Responses of different lengths: `python -m bench.ragged --stage rollout`, or `learn`.

Each token ends its response with probability 4 / T, so lengths are geometric with mean T / 4, cut
at T. `rollout`: four prompts for every slot, in fixed batches and continuously. `learn`: the update
of such a batch, cut to `response_widths`, beside that of a batch of full responses.
"""

import argparse
import json
import math
import time
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ppo_kernel.models import LanguageModel
from ppo_kernel.rollout.generate import generate
from ppo_kernel.rollout.slots import refill_size
from ppo_kernel.types import Prompts

from .cases import Case, build
from .machine import medians_in_turns
from .sizes import parse_size, positive
from .stages import learning

EOS, TURNS = 1, 4


class Ending(eqx.Module):
    """A policy like `model`, but each token is EOS with the same probability."""

    model: LanguageModel
    probability: float = eqx.field(static=True)

    def hidden(self, tokens, mask, start=0):
        return self.model.hidden(tokens, mask, start)

    def unembed(self, hidden):
        return self._with_eos(self.model.unembed(hidden))

    def prefill(self, tokens, mask, capacity):
        return self.model.prefill(tokens, mask, capacity)

    def decoder(self):
        decoder = self.model.decoder()
        return decoder._replace(unembed=lambda hidden: self._with_eos(decoder.unembed(hidden)))

    def _with_eos(self, logits):
        """The EOS logit becomes log sum exp of the others + log(p / (1 - p))."""
        others = jax.nn.logsumexp(logits.at[:, EOS].set(-jnp.inf), axis=-1)
        odds = math.log(self.probability / (1 - self.probability))
        return logits.at[:, EOS].set(others + odds)


def main() -> None:
    """Parse the flags, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny", help="a size, then changes: tiny,response=256")
    parser.add_argument("--stage", default="rollout", choices=("rollout", "learn"))
    parser.add_argument("--dtype", default="float32", help="of parameters, activations and cache")
    parser.add_argument("--slots", type=positive, default=32, help="of the rollout")
    parser.add_argument("--draws", type=positive, default=8, help="of all lengths, for the rollout")
    parser.add_argument(
        "--microbatch", type=positive, default=4, help="sequences, where lengths differ"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    flags = parser.parse_args()
    if parse_size(flags.shape).response < 5:
        raise ValueError("a mean length of response / 4 needs response=5 or more.")
    print(json.dumps(run_rollout(flags) if flags.stage == "rollout" else run_learn(flags)))


def run_learn(flags: argparse.Namespace) -> dict:
    """Stages 3 to 5 with full responses, then with ragged ones, in turns; medians of `rounds`."""
    size = parse_size(flags.shape)
    full, ragged = build(size, flags.dtype), build(size, flags.dtype)
    length = size.response
    lengths = np.minimum(np.random.default_rng(0).geometric(4 / length, size.batch), length)
    widths = tuple(length // n for n in (8, 4, 2) if length >= n)
    config = replace(ragged.config, microbatch_size=flags.microbatch, response_widths=widths)
    stages = {
        "full": learning(full),
        "ragged": learning(replace(ragged, config=config), lengths),
    }
    medians = medians_in_turns({name: stage.run for name, stage in stages.items()}, flags.rounds)
    tokens = size.batch * (size.prompt + length)
    return {
        "shape": flags.shape, "microbatch": flags.microbatch, "response_widths": widths,
        "median_s": {name: round(median, 6) for name, median in medians.items()},
        "ratio": round(medians["ragged"] / medians["full"], 3),
        "share_of_tokens": round(float(lengths.sum() + size.batch * size.prompt) / tokens, 3),
        "compile_s": {name: stage.compile_s for name, stage in stages.items()},
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip


def run_rollout(flags: argparse.Namespace) -> dict:
    """Both programs in turns on the same prompts, each of several draws; medians of `rounds`.

    What can be gained differs from draw to draw, by the lengths that come late: hence several.
    """
    size = replace(parse_size(flags.shape), batch=TURNS * flags.slots)
    case = build(size, flags.dtype)
    policy = Ending(case.state.policy, 4 / size.response)
    batches = [
        jax.tree.map(lambda x, at=at: x[at : at + flags.slots], case.prompts)
        for at in range(0, size.batch, flags.slots)
    ]
    fixed, fixed_s = _compiled(case, policy, batches[0])
    continuous, continuous_s = _compiled(case, policy, case.prompts, decode_slots=flags.slots)
    keys = [jax.random.key(draw) for draw in range(flags.draws)]

    def in_batches(key):
        return [fixed(policy, batch, key) for batch in batches]

    lengths = np.stack([np.concatenate([x.lengths for x in in_batches(key)]) for key in keys])
    same = [
        np.array_equal(drawn, continuous(policy, case.prompts, key).lengths)
        for drawn, key in zip(lengths, keys, strict=True)
    ]
    runs = {
        "fixed": lambda: [in_batches(key) for key in keys],
        "continuous": lambda: [continuous(policy, case.prompts, key) for key in keys],
    }
    medians = medians_in_turns(runs, flags.rounds)
    refill = refill_size(flags.slots)
    longest = lengths.reshape(flags.draws, TURNS, -1).max(axis=2)
    steps = {
        "fixed": int(longest.sum()) - longest.size,
        "continuous": sum(decode_steps(drawn, flags.slots, refill) for drawn in lengths),
        "no_waiting": sum(decode_steps(drawn, flags.slots, 1) for drawn in lengths),
    }
    return {
        "shape": flags.shape, "slots": flags.slots, "dtype": flags.dtype,
        "sequences": size.batch, "draws": flags.draws,
        "mean_length": round(float(lengths.mean()), 2),
        "same_lengths": all(same),
        "median_s": {name: round(median, 6) for name, median in medians.items()},
        "tokens_per_s": {name: round(lengths.sum() / x, 1) for name, x in medians.items()},
        "ratio": round(medians["fixed"] / medians["continuous"], 3),
        "decode_steps": steps,
        "ratio_of_steps": round(steps["fixed"] / steps["continuous"], 3),
        "compile_s": {"fixed": round(fixed_s, 2), "continuous": round(continuous_s, 2)},
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip


def decode_steps(lengths: np.ndarray, slots: int, refill: int) -> int:
    """Steps of a loop that refills as soon as `refill` slots, or all that wait, have room.

    Args:
        lengths: of the responses, in the order in which they are taken.
        slots: decoded at a time.
        refill: sequences; 1 is list scheduling (Graham 1969), the least for this order.
    """
    waiting, running, steps = list(lengths), np.zeros(slots, int), 0
    while waiting or running.any():
        idle = np.flatnonzero(running == 0)
        if waiting and len(idle) >= min(refill, len(waiting)):
            # The first token comes from the prefill.
            for slot in idle[:refill]:
                running[slot] = (waiting.pop(0) - 1) if waiting else 0
            continue
        running, steps = np.maximum(running - 1, 0), steps + 1
    return steps


def _compiled(case: Case, policy: Ending, prompts: Prompts, **changes):
    """(The rollout of a policy, prompts of this shape and a key; seconds of compiling it)."""
    config = replace(case.config.generation, eos_token_ids=(EOS,), **changes)
    sample = eqx.filter_jit(lambda *inputs: generate(*inputs, config=config))
    start = time.perf_counter()
    compiled = sample.lower(policy, prompts, jax.random.key(0)).compile()
    return compiled, time.perf_counter() - start


if __name__ == "__main__":
    main()
