"""What this machine can do, measured here and now through jitted JAX: the roofline's two lines."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from functools import cache

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Machine:
    """Measured limits of one device, in one number type for the products.

    Attributes:
        flops_per_s: the best matrix product of a few shapes.
        bytes_per_s: reading an array far larger than the caches.
        matvec_bytes_per_s: weights read a second in a product of 8 rows, as decoding does.
    """

    flops_per_s: float
    bytes_per_s: float
    matvec_bytes_per_s: float

    def together(self, devices: int) -> "Machine":
        """The limits of several devices; those that a CPU is split into share what it has."""
        if jax.default_backend() == "cpu":
            return self
        return Machine(*(devices * value for value in astuple(self)))

    def describe(self) -> dict[str, float]:
        """The same numbers in units of 1e9, rounded, for tables and files."""
        return {name: round(value / 1e9, 2) for name, value in asdict(self).items()}


def seconds_of(call: Callable[[], object], rounds: int = 7) -> list[float]:
    """Times of `call`, each to the end of its computation, after one call that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def medians_in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, one round of all after the other; a first one is not counted."""
    seconds = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@cache
def measure(dtype: str = "float32") -> Machine:
    """Measure once a process; the best of several, because a limit is what is possible."""
    return Machine(
        flops_per_s=max(_product(*shape, dtype) for shape in _shapes()),
        bytes_per_s=_read(),
        matvec_bytes_per_s=max(_matvec(dtype, transposed) for transposed in (False, True)),
    )


@cache
def _calibration() -> Callable[[], object]:
    """A product of 512 x 512 matrices four times over, then a pass over 32 MB."""
    matrix = jnp.full((512, 512), 1e-3)
    stream = jnp.ones(8_000_000)

    @jax.jit
    def kernel(matrix, stream):
        product = matrix
        for _ in range(4):
            product = product @ matrix
        return product, jnp.sum(stream * 1.5)

    jax.block_until_ready(kernel(matrix, stream))
    return lambda: kernel(matrix, stream)


def calibration_seconds() -> float:
    """Time of a fixed kernel, half products and half memory: the unit of the regression check."""
    kernel = _calibration()
    start = time.perf_counter()
    jax.block_until_ready(kernel())
    return time.perf_counter() - start


def _shapes() -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of the products; an accelerator needs larger ones to be busy."""
    if jax.default_backend() == "cpu":
        return [(1024, 1024, 1024), (1536, 512, 1408), (2048, 2048, 512)]
    return [(8192, 8192, 8192), (16384, 4096, 4096)]


def _product(rows: int, inner: int, columns: int, dtype: str) -> float:
    # Random numbers: equal ones take less power, and a GPU multiplies them faster.
    left, right = (
        jax.random.normal(jax.random.key(i), shape, dtype)
        for i, shape in enumerate([(rows, inner), (inner, columns)])
    )
    multiply = jax.jit(jnp.matmul)
    return 2.0 * rows * inner * columns / _least_seconds(lambda: multiply(left, right))


def _read() -> float:
    values = jnp.ones((256 if jax.default_backend() == "cpu" else 2048) * 2**18)
    total = jax.jit(jnp.sum)
    return values.nbytes / _least_seconds(lambda: total(values))


def _matvec(dtype: str, transposed: bool) -> float:
    rows, weights = jnp.ones((8, 4096), dtype), jnp.ones((4096, 16384), dtype)
    if transposed:
        weights = weights.T.copy()
    multiply = jax.jit(lambda x, w: x @ (w.T if transposed else w))
    return weights.nbytes / _least_seconds(lambda: multiply(rows, weights))


def _least_seconds(call: Callable[[], object]) -> float:
    """The least time of a call; on an accelerator of ten in a row, which hide their starts."""
    times = 1 if jax.default_backend() == "cpu" else 10
    return min(seconds_of(lambda: [call() for _ in range(times)])) / times
