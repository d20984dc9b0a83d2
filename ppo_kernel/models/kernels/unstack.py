"""Stacked parameters -> those of each layer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def plain_unstack(tree: PyTree[Array]) -> list[PyTree[Array]]:
    """[x[0], x[1], ...] for every leaf x."""
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def unstack(tree: PyTree[Array]) -> list[PyTree[Array]]:
    """[x[0], x[1], ...] for every leaf x, whose gradient is one concatenation.

    The gradient of indexing is a sum of arrays of zeros, one for each layer.

    Args:
        tree: every leaf has the same leading axis.

    Returns:
        One tree per index.
    """
    leaves, structure = jax.tree.flatten(tree)
    columns = [jax.lax.split(x, (1,) * len(x)) for x in leaves]
    return [
        jax.tree.unflatten(structure, [jnp.squeeze(x, 0) for x in row])
        for row in zip(*columns, strict=True)
    ]
