"""One stage at one size: `python -m bench.step --shape small,response=256 --stage rollout`."""

import argparse
import json
import statistics

import jax
import jax.numpy as jnp

from ppo_kernel.models.kernels.causal_attention import attend_causally
from ppo_kernel.models.kernels.cudnn import cudnn_attention

from .cases import build
from .machine import measure, seconds_of
from .sizes import parse_size, positive
from .stages import prepare
from .work import WORK, figures


def main() -> None:
    """Parse the flags, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny", help="a size, then changes: tiny,batch=8")
    parser.add_argument("--stage", default="step", choices=sorted(WORK))
    parser.add_argument("--dtype", default="float32", help="of parameters, activations and cache")
    parser.add_argument("--cudnn", action="store_true", help="cuDNN's fused attention (bfloat16)")
    parser.add_argument(
        "--mesh", type=positive, help="devices of a data mesh; a CPU is split into them"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--profile", metavar="DIR", help="write a trace of one more run there")
    flags = parser.parse_args()
    if flags.mesh is not None:
        # Before any computation, or JAX has made its single CPU device already.
        jax.config.update("jax_num_cpu_devices", flags.mesh)
    print(json.dumps(run(flags)))


def run(flags: argparse.Namespace) -> dict:
    """Measure what the flags say; the steady state is the median of `rounds`."""
    size = parse_size(flags.shape)
    attention = cudnn_attention if flags.cudnn else attend_causally
    stage = prepare(flags.stage, build(size, flags.dtype, flags.mesh, attention))
    times = seconds_of(stage.run, flags.rounds)
    if flags.profile:
        with jax.profiler.trace(flags.profile):
            jax.block_until_ready(stage.run())
    median = statistics.median(times)
    machine = measure(flags.dtype).together(flags.mesh or 1)
    return {
        "shape": flags.shape, "stage": flags.stage, "dtype": flags.dtype, "devices": flags.mesh,
        "cudnn": flags.cudnn,
        "median_s": round(median, 6), "min_s": round(min(times), 6),
        "compile_s": stage.compile_s, "temporary_mb": stage.temporary_mb,
        **figures(WORK[flags.stage](size, jnp.dtype(flags.dtype).itemsize), machine, median),
        "machine": machine.describe(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
