"""Judging a function by a reference: Hypothesis strategies, tolerances and `assert_matches`.

For our tests and for yours; needs the `test` extra. An estimator of your own is judged by

    @settings(deadline=None)  # the first case compiles
    @given(reals((4, 6)), masks((4, 6)))
    def test_mine(x, mask):
        assert_matches(mine, mine_in_numpy, x, mask, gamma=0.9)

Shapes are few and fixed, because each new one compiles. The numbers drawn are multiples of 1/8 or
named extremes: casting to a narrower type leaves the multiples as they are, and no comparison is
decided by a rounding error.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from ..ops.dtypes import promote_types

SHAPES = ((4, 6), (1, 1))
"""The [B, T] that our tests use: a usual one and the smallest."""

EXTREME_LOGITS = (-1e4, 1e4)
EXTREME_LOG_RATIOS = (-1e4, -25.0, -20.0, 20.0, 25.0, 1e4)


class Tolerance(NamedTuple):
    """|shipped - reference| may be atol + rtol * |reference|."""

    rtol: float
    atol: float


def _roundings(count: int, dtype: Any) -> Tolerance:
    bound = count * float(jnp.finfo(dtype).eps)
    return Tolerance(bound, bound)


TOLERANCES = {
    # Results of size 1 from numbers of size 10, after at most 50 dependent roundings (GAE over 6
    # tokens, the sums of a softmax): 10 * 50 * eps, made a power of two.
    "float64": _roundings(512, jnp.float64),
    "float32": _roundings(512, jnp.float32),
    # Only element-wise functions return it; a handful of roundings.
    "bfloat16": _roundings(4, jnp.bfloat16),
}
"""By the dtype of a result, not of its input: float32 from bfloat16 input is judged as float32."""

NORM_TOLERANCES = {
    # Some 60 dependent roundings lie on the way of a logit through two layers (a norm 4, a
    # projection 4, rotation 3, attention 8, MLP 8, twice; output head and log-softmax 6).
    "float32 forward": 64 * float(jnp.finfo(jnp.float32).eps),
    # A gradient goes there and back, and whitened advantages, of size 1 from returns of some
    # tenths of a nat, bring a factor of four.
    "float32 gradient": 512 * float(jnp.finfo(jnp.float32).eps),
    # 8e6 roundings: what is wrong in a formula is larger, what is left of float64 much smaller.
    "float64": 1e-9,
}
"""What a whole tensor may be off by, relative to its norm; measured errors are a tenth of it."""


def reals(shape: tuple[int, ...], bound: int = 8) -> st.SearchStrategy:
    """float64 arrays of `shape`: multiples of 1/8 in [-bound, bound]."""
    return hnp.arrays(np.float64, shape, elements=_eighths(-bound, bound))


def logits(shape: tuple[int, ...]) -> st.SearchStrategy:
    """Logits of `shape`: usual ones, +-1e4, and -inf; at least one of a row is finite."""

    @st.composite
    def draw_logits(draw):
        z = draw(_with_extremes(shape, _eighths(-8, 8), EXTREME_LOGITS))
        banned = draw(hnp.arrays(bool, shape))
        spared = draw(hnp.arrays(int, shape[:-1], elements=st.integers(0, shape[-1] - 1)))
        np.put_along_axis(banned, spared[..., None], False, axis=-1)
        return np.where(banned, -np.inf, z)

    return draw_logits()


def log_ratios(shape: tuple[int, ...]) -> st.SearchStrategy:
    """Log-ratios of `shape`: usual ones, and some at and beyond the clamp of +-20."""
    return _with_extremes(shape, _eighths(-3, 3), EXTREME_LOG_RATIOS)


def token_ids(shape: tuple[int, ...], vocabulary: int) -> st.SearchStrategy:
    """int32 arrays of `shape`: ids in [0, vocabulary)."""
    return hnp.arrays(np.int32, shape, elements=st.integers(0, vocabulary - 1))


def masks(shape: tuple[int, int]) -> st.SearchStrategy:
    """Masks of `shape` [B, T]: rows empty, full, ragged, a single token, or with holes."""
    slots = np.arange(shape[1])
    row = st.one_of(
        st.integers(0, shape[1]).map(lambda length: slots < length),
        st.sampled_from((np.zeros(shape[1], bool), np.ones(shape[1], bool))),
        st.integers(0, shape[1] - 1).map(lambda place: slots == place),
        hnp.arrays(bool, shape[1]),
    )
    return st.tuples(*[row] * shape[0]).map(np.stack)


def repadded_responses(shape: tuple[int, int], vocabulary: int) -> st.SearchStrategy:
    """(mask, tokens, tokens): right-padded responses, once padded with the EOS id, once not.

    EOS is id 0, ends every response that has room for it, and may occur inside one too. `shape`
    is [B, T]; the other ids are below `vocabulary`.
    """

    slots = np.arange(shape[1])

    def pad(tokens, lengths, other):
        tokens = np.where(slots == lengths[:, None] - 1, 0, tokens)
        mask = slots < lengths[:, None]
        return mask, *(np.where(mask, tokens, pad_id).astype(np.int32) for pad_id in (0, other))

    return st.builds(
        pad,
        token_ids(shape, vocabulary),
        hnp.arrays(int, shape[0], elements=st.integers(0, shape[1])),
        st.integers(1, vocabulary - 1),
    )


def assert_matches(
    fn: Callable, reference_fn: Callable, *args: Any, dtype: str = "float32", **kwargs: Any
) -> None:
    """Run `fn` eager, jitted and vmapped, and compare each with `reference_fn`.

    Under vmap every argument is stacked twice along a new leading axis. The reference gets the
    same numbers, rounded to `dtype`, as float64. Compiled functions are kept by (fn, static
    arguments), so pass the same function object each time.

    Args:
        fn: the judged function; returns arrays, or a pytree of them.
        reference_fn: same signature, on NumPy arrays; rank-0 keywords reach it as Python numbers.
        args: arrays.
        dtype: "float32", "float64" (switched on inside) or "bfloat16"; floats are cast to it.
        kwargs: floats and arrays are traced (floats in at least float32, and plain numbers where
            the call is eager); anything else is static.

    Raises:
        AssertionError: names the function, the variant, the case and the largest difference.
    """
    with jax.enable_x64(dtype == "float64"):
        wide = promote_types(dtype, jnp.float32)
        arrays = [_cast(x, dtype) for x in args]
        traced = {k: _cast(v, wide) for k, v in kwargs.items() if isinstance(v, float | np.ndarray)}
        static = {k: v for k, v in kwargs.items() if k not in traced}
        exact = {k: _exact(v).item() if v.ndim == 0 else _exact(v) for k, v in traced.items()}
        expected = jax.tree.leaves(reference_fn(*map(_exact, arrays), **exact, **static))
        case = f"shapes {[x.shape for x in arrays]}, {kwargs}"
        for variant, outputs in _variants(fn, arrays, traced, static):
            problem = _difference(jax.tree.leaves(outputs), expected, dtype)
            if problem is not None:
                raise AssertionError(f"{_name(fn)} ({variant}, {dtype}), {case}: {problem}")


def _eighths(low: int, high: int) -> st.SearchStrategy:
    return st.integers(8 * low, 8 * high).map(lambda n: n / 8)


def _with_extremes(shape, usual, extremes) -> st.SearchStrategy:
    elements = st.one_of(usual, usual, usual, st.sampled_from(extremes))
    return hnp.arrays(np.float64, shape, elements=elements)


def _cast(x: Any, dtype: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _exact(x: np.ndarray) -> np.ndarray:
    return _cast(x, np.float64)


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or repr(fn)


@cache
def _compiled(fn: Callable, static: tuple, mapped: bool) -> Callable:
    def call(arrays, traced):
        return fn(*arrays, **traced, **dict(static))

    return jax.jit(jax.vmap(call) if mapped else call)


def _variants(fn: Callable, arrays: list, traced: dict, static: dict):
    arrays, traced = jax.tree.map(jnp.asarray, (arrays, traced))
    numbers = {k: v.item() for k, v in traced.items() if v.ndim == 0 and v.dtype.kind == "f"}
    # Without disable_jit every eager scan would compile anew; with it, it is a Python loop.
    with jax.disable_jit():
        outputs = fn(*arrays, **(traced | numbers), **static)
    yield "eager", outputs
    frozen = tuple(sorted(static.items()))
    yield "jit", _compiled(fn, frozen, False)(arrays, traced)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (arrays, traced))
    stacked = _compiled(fn, frozen, True)(*twice)
    for i in range(2):
        yield f"vmap, copy {i}", [x[i] for x in jax.tree.leaves(stacked)]


def _difference(outputs: list, expected: list, dtype: str) -> str | None:
    """What is wrong with the outputs, or None."""
    if len(outputs) != len(expected):
        return f"{len(outputs)} outputs, the reference has {len(expected)}"
    for i, (got, want) in enumerate(zip(outputs, map(np.asarray, expected), strict=True)):
        if got.shape != want.shape:
            return f"output {i} has shape {got.shape}, the reference {want.shape}"
        floating = jnp.issubdtype(got.dtype, jnp.floating)
        if floating != np.issubdtype(want.dtype, np.floating):
            return f"output {i} is {got.dtype}, the reference {want.dtype}"
        if floating and promote_types(got.dtype, dtype) != got.dtype:
            return f"output {i} is {got.dtype}, narrower than its input"
        tolerance = TOLERANCES[str(got.dtype)] if floating else Tolerance(0.0, 0.0)
        a, b = np.asarray(got).astype(np.float64), want.astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        off = np.where(same, 0.0, np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b)))
        allowed = tolerance.atol + tolerance.rtol * np.where(np.isfinite(b), np.abs(b), 0.0)
        if not np.all(off <= allowed):
            worst = np.unravel_index(np.argmax(np.nan_to_num(off - allowed, nan=np.inf)), a.shape)
            return (
                f"output {i} is off by {off[worst]:.3g} at {tuple(map(int, worst))}: "
                f"{float(a[worst])}, the reference {float(b[worst])}, allowed {allowed[worst]:.3g}"
            )
    return None
