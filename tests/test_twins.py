"""Properties that every row of `twins.ROWS` shares."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from twins import ROWS

from ppo_kernel.testing import SHAPES, TOLERANCES, assert_matches

MASKED = [row for row in ROWS if row.mask is not None]
shapes = st.sampled_from(SHAPES)


def run(row, args, keywords, dtype="float32"):
    floating = [np.issubdtype(x.dtype, np.floating) for x in args]
    args = [jnp.asarray(x, dtype if f else x.dtype) for x, f in zip(args, floating, strict=True)]
    is_array = {k: isinstance(v, np.ndarray) for k, v in keywords.items()}
    keywords = {k: jnp.asarray(v) if is_array[k] else v for k, v in keywords.items()}
    with jax.disable_jit():  # otherwise every eager scan compiles anew
        return [np.asarray(x) for x in jax.tree.leaves(row.shipped(*args, **keywords))]


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, *TOLERANCES["float32"])


@pytest.mark.parametrize(
    ("row", "dtype"), [(row, dtype) for row in ROWS for dtype in row.dtypes], ids=str
)
@given(data=st.data())
def test_equals_its_reference(row, dtype, data):
    shape = data.draw(shapes) if dtype == "float32" else SHAPES[0]
    args, keywords = data.draw(row.cases(shape))
    assert_matches(row.shipped, row.reference, *args, dtype=dtype, **keywords)


@pytest.mark.parametrize("row", [row for row in ROWS if row.plants], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@given(data=st.data())
def test_a_planted_nan_or_infinity_ends_where_the_reference_says(row, data):
    args, keywords = data.draw(row.cases(SHAPES[0]))
    floating = [i for i, x in enumerate(args) if np.issubdtype(x.dtype, np.floating)]
    planted = data.draw(st.sampled_from(floating))
    place = data.draw(st.integers(0, args[planted].size - 1))
    args = [np.array(x) for x in args]
    args[planted].flat[place] = data.draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    assert_matches(row.shipped, row.reference, *args, **keywords)


@pytest.mark.parametrize("row", [row for row in ROWS if "bfloat16" in row.dtypes], ids=str)
@given(data=st.data())
def test_is_at_least_float32_unless_it_says_so(row, data):
    args, keywords = data.draw(row.cases(SHAPES[0]))
    for result in run(row, args, keywords, "bfloat16"):
        assert result.dtype in (bool, np.float32) or (row.narrow and result.dtype == "bfloat16")


@pytest.mark.parametrize("row", MASKED, ids=str)
@given(data=st.data())
def test_masked_places_change_nothing(row, data):
    args, keywords = data.draw(row.cases(SHAPES[0]))
    mask = args[row.mask]
    poisoned = [
        np.where(mask, x, np.nan) if x.shape == mask.shape and x is not mask else x for x in args
    ]
    for got, want in zip(run(row, poisoned, keywords), run(row, args, keywords), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("row", MASKED, ids=str)
@given(data=st.data())
def test_more_padding_changes_nothing(row, data):
    args, keywords = data.draw(row.cases(SHAPES[0]))
    slots = SHAPES[0][1]
    padded = [np.pad(x, ((0, 0), (0, 3))) if x.ndim == 2 else x for x in args]
    for got, want in zip(run(row, padded, keywords), run(row, args, keywords), strict=True):
        if want.ndim == 2:
            assert not got[:, slots:].any()
            got = got[:, :slots]
        assert_close([got], [want])


@pytest.mark.parametrize("row", [row for row in ROWS if row.per_row], ids=str)
@given(data=st.data())
def test_batch_order_changes_nothing(row, data):
    args, keywords = data.draw(row.cases(SHAPES[0]))
    order = np.asarray(data.draw(st.permutations(range(SHAPES[0][0]))))
    want = [x[order] for x in run(row, args, keywords)]
    assert_close(run(row, [x[order] for x in args], keywords), want)
