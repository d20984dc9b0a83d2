"""`assert_matches` finds what is wrong and says where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import find, given

from ppo_kernel.testing import assert_matches, logits, masks, repadded_responses

X = np.array([[0.0, 1.0], [2.0, 3.0]])


def double(x, *, factor=2.0, name=None):
    del name
    return x * factor if isinstance(x, np.ndarray) else x * jnp.asarray(factor, x.dtype)


def off_at_3(x, *, factor=2.0, name=None):
    del name
    return jnp.where(x == 3, 6.5, double(x, factor=factor))


@jax.custom_batching.custom_vmap
def off_under_vmap(x):
    return 2.0 * x


@off_under_vmap.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return 2.0 * jnp.flip(x, 0).at[0].add(1.0), in_batched[0]


def off_under_jit(x):
    return x * (3.0 if isinstance(x, jax.core.Tracer) else 2.0)


def off_by_a_type(x):
    return (2 * x).astype(int)


def off_in_float64(x):
    return 2 * x.astype(jnp.float32)


def off_at_infinity(x):
    return jnp.where(x == 3, jnp.inf, 2 * x)


def off_by_a_shape(x):
    return (2 * x)[0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_right_function_passes(dtype):
    assert_matches(double, double, X, dtype=dtype, factor=0.3, name="static")


@pytest.mark.parametrize(
    ("fn", "dtype", "message"),
    [
        (off_at_3, "float32", r"off_at_3 \(eager, float32\).*\(2, 2\).*off by 0\.5 at \(1, 1\)"),
        (off_under_jit, "float64", r"off_under_jit \(jit, float64\).*off by 3 at \(1, 1\)"),
        (off_under_vmap, "float32", r"off_under_vmap \(vmap, copy 0, float32\).*off by 2 at"),
        (off_by_a_type, "float32", r"output 0 is int32, the reference float64"),
        (off_in_float64, "float64", r"output 0 is float32, narrower than its input"),
        (off_at_infinity, "float32", r"off by inf at \(1, 1\): inf, the reference 6\.0"),
        (off_by_a_shape, "float32", r"output 0 has shape \(2,\), the reference \(2, 2\)"),
    ],
)
def test_a_wrong_function_is_named_with_variant_and_place(fn, dtype, message):
    with pytest.raises(AssertionError, match=message):
        assert_matches(fn, double, X, dtype=dtype)


def test_keywords_are_named():
    with pytest.raises(AssertionError, match=r"'factor': 0\.5, 'name': 'case'"):
        assert_matches(off_at_3, double, X, factor=0.5, name="case")


def test_masks_reach_every_kind_of_row():
    kinds = {
        "empty": lambda row: not row.any(),
        "full": lambda row: row.all(),
        "one token": lambda row: row.sum() == 1,
        "a hole": lambda row: (np.diff(np.flatnonzero(row)) > 1).any(),
    }
    for kind in kinds.values():
        find(masks((4, 6)), lambda mask, kind=kind: any(map(kind, mask)))


@given(logits((4, 7)), repadded_responses((4, 6), 7))
def test_strategies_keep_their_promises(z, response):
    assert np.isfinite(z).any(axis=-1).all()
    mask, eos_padded, padded = response
    np.testing.assert_array_equal(eos_padded[mask], padded[mask])
    assert (eos_padded[~mask] == 0).all()
    assert (padded[~mask] != 0).all()
    assert all(row[valid][-1] == 0 for row, valid in zip(padded, mask, strict=True) if valid.any())
