"""Times one compiled program under pytest-benchmark and writes what it means to `extra_info`."""

from collections.abc import Callable

import jax

from .machine import calibration_seconds, measure
from .work import Work, figures


def memory_mb(compiled: jax.stages.Compiled) -> float | None:
    """Temporary memory of a program, 1e6 bytes; None where the backend does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else round(analysis.temp_size_in_bytes / 1e6, 2)


def record(
    benchmark,
    name: str,
    call: Callable[[], object],
    work: Work,
    *,
    rounds: int,
    compile_s: float,
    temporary_mb: float | None,
    dtype: str = "float32",
) -> None:
    """Time `call`, with the calibration kernel before each round, so that both see one machine.

    The kernel also empties the caches: every round starts cold.
    """
    calibrations = []
    benchmark.pedantic(
        lambda: jax.block_until_ready(call()),
        setup=lambda: calibrations.append(calibration_seconds()),
        rounds=rounds,
        warmup_rounds=1,
    )
    if benchmark.stats is None:
        return
    machine = measure(dtype)
    benchmark.extra_info.update(
        figures(work, machine, benchmark.stats["median"]),
        name=name,
        device=jax.devices()[0].device_kind,
        compile_s=round(compile_s, 3),
        temporary_mb=temporary_mb,
        calibration_s=min(calibrations),
        machine=machine.describe(),
    )
