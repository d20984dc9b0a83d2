"""A training state on disk and back, by Orbax: models, moments, counters and the RNG key."""

import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree


def save_checkpoint(path: str | os.PathLike, state: PyTree) -> None:
    """Write every array of `state` to the folder `path`, whole or not at all.

    An existing checkpoint at `path` is replaced.
    """
    arrays = _storable(eqx.filter(state, eqx.is_array))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), arrays, force=True)


def load_checkpoint(path: str | os.PathLike, state: PyTree) -> PyTree:
    """The state saved at `path`, with the structure, types and shardings of `state`.

    Raises:
        ValueError: there is no checkpoint at `path`, or it is of another structure.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise ValueError(f"no checkpoint at {folder}; pass a folder that save_checkpoint wrote.")
    arrays, rest = eqx.partition(state, eqx.is_array)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(arrays))
    with ocp.StandardCheckpointer() as checkpointer:
        loaded = checkpointer.restore(folder, target)
    flat, structure = jax.tree_util.tree_flatten_with_path(arrays)
    restored = [
        jax.random.wrap_key_data(loaded[_name(key_path)], impl=jax.random.key_impl(old))
        if _is_key(old)
        else loaded[_name(key_path)]
        for key_path, old in flat
    ]
    return eqx.combine(jax.tree.unflatten(structure, restored), rest)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(key_path: tuple) -> str:
    return jax.tree_util.keystr(key_path)


def _storable(arrays: PyTree) -> dict[str, jax.Array]:
    """Path in the tree -> array, so that a checkpoint can be read without our classes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {_name(key_path): jax.random.key_data(x) if _is_key(x) else x for key_path, x in flat}
