"""Which parameters weight decay shrinks: the matrices."""

import re

import jax
from jaxtyping import PyTree

_NO_MATRIX = re.compile(r"bias|norm", re.IGNORECASE)


def matrices(parameters: PyTree) -> PyTree[bool]:
    """True for each matrix (linear layers, embedding, output matrix), false for all else.

    The layers of a Transformer are stacked, so a norm's weights [L, D] and biases [L, out] have
    two axes as well: they are known by their names, in a model of your own too, where "bias" or
    "norm" is part of them.

    Args:
        parameters: arrays by path, as Optax passes them to a mask; None where nothing is trained.
    """

    def is_matrix(path: tuple, x: jax.Array) -> bool:
        return x.ndim > 1 and not _NO_MATRIX.search(jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(is_matrix, parameters)
