"""A decode step beside its bare matrix products: `python -m bench.decode --shape small`."""

import argparse
import json
from dataclasses import replace

import jax
import jax.numpy as jnp

from ppo_kernel.config import GenerationConfig, IterationConfig
from ppo_kernel.models import LanguageModel
from ppo_kernel.models.kernels.decode_matmul import DecodeMatrix
from ppo_kernel.models.linear import decoding

from .cases import build
from .machine import measure, medians_in_turns
from .sizes import parse_size, positive
from .stages import prepare
from .work import rollout_work


def bare_products(policy: LanguageModel, rows: int, form: str, steps: int):
    """A call that multiplies `rows` with every matrix of a step, each after the one before.

    Args:
        policy: whose matrices.
        rows: sequences.
        form: one of `FORMS`.
        steps: how often, in a compiled loop, before which the matrices are laid out.
    """
    lay_out, head_times = FORMS[form]
    head = policy.trunk.embedding if policy.output is None else policy.output

    def run(blocks, head, x):
        layers = []
        for index in range(policy.trunk.config.num_layers):
            block = jax.tree.map(lambda leaf, i=index: leaf[i], blocks)
            attention, mlp = block.attention, block.mlp
            layers.append((
                lay_out(attention.query, attention.key, attention.value), lay_out(attention.output),
                lay_out(mlp.gate, mlp.up), lay_out(mlp.down),
            ))  # fmt: skip
        unembed = head_times(head)

        def step(_, x):
            for inputs, output, gate_and_up, down in layers:
                query, key, value = inputs(x)
                x = x + output(query + jnp.sum(key + value))[0]
                gate, up = gate_and_up(x)
                x = x + down(gate * up)[0]
            # Whatever makes the next step wait for the logits, and keeps the numbers finite.
            return x / (1.0 + jnp.max(jnp.abs(x)) + jnp.max(unembed(x)))

        return jax.lax.fori_loop(0, steps, step, x)

    x = jnp.full((rows, policy.trunk.config.hidden_size), 1e-3, policy.trunk.config.compute_dtype)
    compiled = jax.jit(run)
    return lambda: compiled(policy.trunk.blocks, head, x)


def _transposed(*layers):
    """Every layer by itself, its matrix in memory as [out, in]."""
    matrices = jax.lax.optimization_barrier([layer.weight.T for layer in layers])
    return lambda x: tuple(x @ matrix.T for matrix in matrices)


def _head_in_out(matrix):
    matrix = jax.lax.optimization_barrier(matrix.T)
    return lambda x: x @ matrix


FORMS = {
    "in_out": (lambda *layers: lambda x: tuple(layer(x) for layer in layers), _head_in_out),
    "out_in": (_transposed, lambda matrix: lambda x: x @ matrix.T),
    "packed": (decoding, DecodeMatrix.of),
}
"""Name -> how layers of one input multiply, and the head: plain, plain, as the kernel does."""


def main() -> None:
    """Parse the flags, measure all in turns, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="small", help="a size, then changes: tiny,batch=8")
    parser.add_argument("--dtype", default="float32", help="of parameters, activations and cache")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--rounds", type=positive, default=9)
    flags = parser.parse_args()
    size = parse_size(flags.shape)
    if size.response < 2:
        raise ValueError(f"response={size.response} has no decode step; take 2 or more.")
    case = build(size, flags.dtype)
    steps = size.response - 1
    one_token = IterationConfig(GenerationConfig(1))
    medians = medians_in_turns(
        {
            "rollout": prepare("rollout", case).run,
            "first_token": prepare("rollout", replace(case, config=one_token)).run,
        }
        | {form: bare_products(case.reference, size.batch, form, steps) for form in flags.forms},
        flags.rounds,
    )
    step = (medians["rollout"] - medians["first_token"]) / steps
    bare = {form: medians[form] / steps for form in flags.forms}
    _, decoding = rollout_work(size, jnp.dtype(flags.dtype).itemsize).phases
    bandwidth = decoding.bytes / steps / step
    report = {
        "shape": flags.shape, "dtype": flags.dtype, "step_ms": round(1e3 * step, 3),
        "bare_ms": {form: round(1e3 * seconds, 3) for form, seconds in bare.items()},
        "ratio": round(step / min(bare.values()), 3) if bare else None,
        "gb_per_s": round(bandwidth / 1e9, 1),
        "of_bandwidth": round(bandwidth / measure(flags.dtype).bytes_per_s, 3),
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
