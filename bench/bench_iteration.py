"""Every stage and the whole step at the named sizes: steady state, compiling apart.

`BENCH_SIZES=tiny,small,qwen05` picks the sizes and `BENCH_DTYPE` the type; docs/benchmarks.md
says what each number in `extra_info` means.
"""

import os

import jax.numpy as jnp
import pytest

from bench.cases import build
from bench.recording import record
from bench.sizes import parse_size
from bench.stages import STAGES, prepare
from bench.work import WORK

SIZES = os.environ.get("BENCH_SIZES", "tiny,small").split(",")
DTYPE = os.environ.get("BENCH_DTYPE", "float32")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size_name", SIZES)
def bench_stage(benchmark, size_name, stage):
    benchmark.group = f"{size_name}, {DTYPE}"
    size = parse_size(size_name)
    prepared = prepare(stage, build(size, DTYPE))
    record(
        benchmark, stage, prepared.run, WORK[stage](size, jnp.dtype(DTYPE).itemsize),
        rounds=3 if size.policy_parameters > 100e6 else 7, dtype=DTYPE,
        compile_s=prepared.compile_s, temporary_mb=prepared.temporary_mb,
    )  # fmt: skip
