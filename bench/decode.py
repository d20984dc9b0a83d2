"""A decode step beside its bare matrix products: `python -m bench.decode --shape small`."""

import argparse
import json
from dataclasses import replace

import jax
import jax.numpy as jnp

from ppo_kernel.models import LanguageModel

from .cases import build
from .machine import medians_in_turns
from .sizes import parse_size
from .stages import prepare


def bare_products(policy: LanguageModel, rows: int, *, transposed: bool):
    """A call that multiplies `rows` with every matrix of a step, each waiting for the one before.

    Args:
        policy: whose matrices.
        rows: sequences.
        transposed: whether the matrices lie in memory as [out, in].
    """

    def lay_out(matrix):
        return jax.block_until_ready(jnp.asarray(matrix.T if transposed else matrix, copy=True))

    def times(x, matrix):
        return x @ (matrix.T if transposed else matrix)

    config, blocks = policy.trunk.config, policy.trunk.blocks
    matrices = {
        name: layer.weight
        for part in (blocks.attention, blocks.mlp)
        for name, layer in vars(part).items()
        if hasattr(layer, "weight") and layer.weight.ndim == 3
    }
    layers = [
        {name: lay_out(stack[index]) for name, stack in matrices.items()}
        for index in range(config.num_layers)
    ]
    head = lay_out(policy.trunk.embedding.T if policy.output is None else policy.output)

    def step(x, layers, head):
        for layer in layers:
            key, value = times(x, layer["key"]), times(x, layer["value"])
            mixed = times(x, layer["query"]) + jnp.sum(key + value)
            x = x + times(mixed, layer["output"])
            x = x + times(times(x, layer["gate"]) * times(x, layer["up"]), layer["down"])
        return times(x, head)

    x = jnp.full((rows, config.hidden_size), 1e-3, config.compute_dtype)
    compiled = jax.jit(step)
    return lambda: compiled(x, layers, head)


def main() -> None:
    """Parse the flags, measure all in turns, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="small", help="a size, then changes: tiny,batch=8")
    parser.add_argument("--dtype", default="float32", help="of parameters, activations and cache")
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args()
    size = parse_size(flags.shape)
    case = build(size, flags.dtype)
    medians = medians_in_turns(
        {
            "rollout": prepare("rollout", case).run,
            "first_token": prepare("rollout", build(replace(size, response=1), flags.dtype)).run,
            "in_out": bare_products(case.reference, size.batch, transposed=False),
            "out_in": bare_products(case.reference, size.batch, transposed=True),
        },
        flags.rounds,
    )
    step = (medians["rollout"] - medians["first_token"]) / (size.response - 1)
    bare = min(medians["in_out"], medians["out_in"])
    report = {
        "shape": flags.shape, "dtype": flags.dtype, "step_ms": round(1e3 * step, 3),
        "bare_ms": {name: round(1e3 * medians[name], 3) for name in ("in_out", "out_in")},
        "ratio": round(step / bare, 3), "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
