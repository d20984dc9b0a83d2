"""The iteration compiled for a TPU that is not there: does it fit, and what do its loops do?

`pip install -e '.[bench,tpu]'`, then
`python -m bench.topology --topology v5e:4x4 --shape qwen05,batch=64,prompt=256,response=256`.
"""

import argparse
import json
import math
import re
import time

import equinox as eqx
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import PyTree

from ppo_kernel.iteration import ppo_iteration
from ppo_kernel.learner.state import Learner
from ppo_kernel.models import LanguageModel, Transformer, ValueModel
from ppo_kernel.program import compiler_options
from ppo_kernel.sharding import MESH_AXES, at_rest, entered, shardings

from .cases import even_fraction, model_config, random_prompts, settings
from .sizes import Size, parse_size


def main() -> None:
    """Parse the flags, compile, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny", help="a size, then changes: tiny,batch=64")
    parser.add_argument("--dtype", default="bfloat16", help="of parameters, activations and cache")
    parser.add_argument("--topology", default="v5e:4x4", help="a TPU as its compiler names it")
    flags = parser.parse_args()
    # The compiler is all that is needed of the TPU; what is computed meanwhile is on the CPU.
    jax.config.update("jax_platforms", "cpu")
    size = parse_size(flags.shape)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology)
    mesh = Mesh(np.array(topology.devices).reshape(1, -1, 1), MESH_AXES)
    start = time.perf_counter()
    compiled = compile_for(mesh, size, flags.dtype)
    seconds = round(time.perf_counter() - start, 1)
    rows = size.batch // mesh.size
    print(json.dumps({
        "topology": flags.topology, "shape": flags.shape, "dtype": flags.dtype,
        "compile_s": seconds, **memory(compiled),
        "decode_loops": [loop_facts(body) for body in decode_loops(compiled.as_text(), size, rows)],
    }))  # fmt: skip


def compile_for(mesh: Mesh, size: Size, dtype: str) -> jax.stages.Compiled:
    """The whole iteration for the devices of a mesh, from shapes alone: no array is made.

    Raises:
        ValueError: the batch does not divide over the devices.
    """
    if size.batch % mesh.size:
        raise ValueError(
            f"a batch of {size.batch} does not divide over {mesh.size} devices; "
            f"pass a multiple in --shape, such as batch={4 * mesh.size}."
        )
    shapes = eqx.filter_eval_shape(_arguments, size, dtype)
    arguments = [_on(mesh, x, axis) for x, axis in zip(shapes, _AXES, strict=True)]
    (state, *others), static = eqx.partition(arguments, _is_shape)
    config, _ = settings(size)

    def iterate(state, others):
        arguments = eqx.combine([state, *others], static)
        state, metrics = ppo_iteration(*arguments, reward=even_fraction, config=config)
        return eqx.filter(at_rest(state), eqx.is_array), metrics

    jit = jax.jit(iterate, donate_argnums=0, compiler_options=compiler_options(mesh))
    with entered(mesh):
        return jit.lower(state, others).compile()


def _arguments(size: Size, dtype: str):
    """State, reference, prompts and hyper-parameters of an iteration."""
    model = model_config(size, dtype)
    reference = LanguageModel.init(jax.random.key(0), model)
    critic = ValueModel.on(Transformer.init(jax.random.key(1), model))
    _, hyperparams = settings(size)
    state = Learner().init(reference, critic, jax.random.key(2), hyperparams)
    return state, reference, random_prompts(size), hyperparams


_AXES = ("parameter", "parameter", "batch", "parameter")
"""By which row of the sharding table each of them lies on the mesh."""


def _is_shape(x) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _on(mesh: Mesh, tree: PyTree, axis: str) -> PyTree:
    shapes, rest = eqx.partition(tree, _is_shape)

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return eqx.combine(jax.tree.map(placed, shapes, shardings(shapes, mesh, axis)), rest)


def memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Of one device, 1e9 bytes: arguments, results in their place, what the program adds."""
    analysis = compiled.memory_analysis()
    return {
        "arguments_gb": round(analysis.argument_size_in_bytes / 1e9, 2),
        "in_place_gb": round(analysis.alias_size_in_bytes / 1e9, 2),
        "temporary_gb": round(analysis.temp_size_in_bytes / 1e9, 2),
    }


def decode_loops(text: str, size: Size, rows: int) -> list[list[str]]:
    """The bodies of loops that carry a cache: keys [rows, K, E, S] of every layer."""
    cache = re.compile(rf"\w+\[{rows},{size.kv_heads},{size.head_dim},\d+\]")
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    parts = [part.strip().splitlines() for part in text.split("\n\n")]
    named = [(re.match(r"%?([\w.\-]+) \(", lines[0]), lines) for lines in parts if lines]
    return [
        lines
        for match, lines in named
        if match and match.group(1) in bodies and len(cache.findall(lines[0])) >= size.layers
    ]


def loop_facts(body: list[str]) -> dict[str, int]:
    """Of a decode step: exchanges between devices, updates in place, the largest copy in bytes.

    Copies from one memory of a device to another, ahead of their use, are not counted.
    """
    made = [re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line) for line in body]
    found = [match.groups() for match in made if match]
    exchange = re.compile(r"all-|collective-|reduce-scatter")
    return {
        "exchanges": sum(bool(exchange.match(kind)) for _, _, kind in found),
        "updates_in_place": sum("dynamic-update-slice" in name for name, _, _ in found),
        "largest_copy_bytes": max((_bytes(t) for _, t, kind in found if kind == "copy"), default=0),
    }


def _bytes(shape: str) -> int:
    """Of the first array in a type as HLO prints it."""
    kind, dimensions = re.search(r"([a-z]+\d*)\[([\d,]*)\]", shape).groups()
    bits = int(re.sub(r"\D", "", kind) or 8)
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


if __name__ == "__main__":
    main()
