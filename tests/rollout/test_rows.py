"""Parts of a batch: read and written by indices of their own, which plain loops judge."""

import jax.numpy as jnp
import numpy as np
from jax import tree

from ppo_kernel.rollout.rows import merge, put_rows, split, take_rows

PARTS, ROWS = 3, 4
TREE = {"cache": jnp.arange(PARTS * ROWS * 5.0).reshape(-1, 5), "slot": jnp.asarray(7)}


def test_split_and_merge_undo_each_other():
    parts = split(TREE["cache"], PARTS)
    assert parts.shape == (PARTS, ROWS, 5)
    np.testing.assert_array_equal(merge(parts), TREE["cache"])


def test_rows_are_taken_from_their_own_part():
    at = jnp.array([[3, 0], [1, 1], [2, 9]])
    taken = take_rows(TREE, at)
    assert int(taken["slot"]) == 7
    for part in range(PARTS):
        for place in range(2):
            # An index outside gets the nearest row, and none of another part.
            want = TREE["cache"][part * ROWS + min(int(at[part, place]), ROWS - 1)]
            np.testing.assert_array_equal(taken["cache"][2 * part + place], want)


def test_rows_are_put_into_their_own_part_and_nowhere_from_outside():
    at = jnp.array([[3, 0], [1, 4], [9, 2]])
    rows = {"cache": -1.0 - jnp.arange(PARTS * 2 * 5.0).reshape(-1, 5), "slot": jnp.asarray(0)}
    want = np.array(TREE["cache"])
    for part in range(PARTS):
        for place in range(2):
            if at[part, place] < ROWS:
                want[part * ROWS + at[part, place]] = rows["cache"][2 * part + place]
    changed = put_rows(TREE, rows, at)
    np.testing.assert_array_equal(changed["cache"], want)
    assert int(changed["slot"]) == 7
    assert tree.structure(changed) == tree.structure(TREE)
