"""A batch in equal parts, each read and written by indices of its own: [Q * n, ...] as [Q, n, ...].

A part that is on one device then never asks another.
"""

import jax
from jaxtyping import Array, Int, PyTree


def split(x: Array, parts: int) -> Array:
    """[Q * n, ...] -> [Q, n, ...]."""
    return x.reshape(parts, -1, *x.shape[1:])


def merge(x: Array) -> Array:
    """[Q, n, ...] -> [Q * n, ...]."""
    return x.reshape(-1, *x.shape[2:])


def take(x: Array, *indices: Int[Array, "Q X"]) -> Array:
    """x[q, i, ...] for the indices of each part, the nearest one where there is none."""
    return jax.vmap(lambda x, *i: x.at[i].get(mode="clip"))(x, *indices)


def put(x: Array, values: Array, *indices: Int[Array, "Q X"]) -> Array:
    """`x` with values[q, j] at x[q, i, ...] for the indices [q, j]; one outside is left out."""
    write = jax.vmap(lambda x, v, *i: x.at[i].set(v, mode="drop", unique_indices=True))
    return write(x, values, *indices)


def take_rows(tree: PyTree[Array], at: Int[Array, "Q X"]) -> PyTree[Array]:
    """Rows of merged leaves [Q * n, ...], by indices in each part; a rank-0 leaf as it is."""
    return jax.tree.map(lambda x: merge(take(split(x, len(at)), at)) if x.ndim else x, tree)


def put_rows(tree: PyTree[Array], rows: PyTree[Array], at: Int[Array, "Q X"]) -> PyTree[Array]:
    """`tree` with `rows` at these indices of each part; its rank-0 leaves stay."""

    def write(x: Array, values: Array) -> Array:
        parts = len(at)
        return merge(put(split(x, parts), split(values, parts), at)) if x.ndim else x

    return jax.tree.map(write, tree, rows)
