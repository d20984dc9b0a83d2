"""A training state on disk and back, by Orbax: models, moments, counters and the RNG key."""

import os
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .folders import not_saved


def save_checkpoint(path: str | os.PathLike, state: PyTree) -> None:
    """Write every array of `state` to the folder `path`, whole or not at all.

    An existing checkpoint at `path` is replaced when the new one is complete: a save that fails or
    is killed leaves the old one to `load_checkpoint`. Two are on disk for that time.

    Raises:
        OSError: the checkpoint cannot be written, as on a full disk.
    """
    folder = Path(path).resolve()
    arrays = _storable(eqx.filter(state, eqx.is_array))
    # Orbax reports a full disk as a ValueError of its storage library.
    with not_saved(folder, ValueError):
        try:
            # Orbax replaces a checkpoint by deleting it first, so the new one is written beside it.
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(_beside(folder, "saving"), arrays, force=True)
        except Exception:
            # Half a checkpoint would keep a full disk full.
            for left in folder.parent.glob(f"{_beside(folder, 'saving').name}*"):
                shutil.rmtree(left, ignore_errors=True)
            raise
        if jax.process_index() == 0:
            _publish(folder)
    # No process goes on, to a load perhaps, before the checkpoint is in its place.
    multihost_utils.sync_global_devices(f"save_checkpoint {folder}")


def has_checkpoint(path: str | os.PathLike) -> bool:
    """Whether `load_checkpoint` finds one at `path`."""
    return _saved_at(Path(path).resolve()).is_dir()


def load_checkpoint(path: str | os.PathLike, state: PyTree) -> PyTree:
    """The state saved at `path`, with the structure, types and shardings of `state`.

    Raises:
        ValueError: there is no checkpoint at `path`, or it is of another structure or other types.
    """
    folder = _saved_at(Path(path).resolve())
    if not folder.is_dir():
        raise ValueError(f"no checkpoint at {folder}; pass a folder that save_checkpoint wrote.")
    arrays, rest = eqx.partition(state, eqx.is_array)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(arrays))
    with ocp.StandardCheckpointer() as checkpointer:
        _check_leaves(folder, checkpointer.metadata(folder).item_metadata.tree, target)
        loaded = checkpointer.restore(folder, target)
    flat, structure = jax.tree_util.tree_flatten_with_path(arrays)
    restored = [
        jax.random.wrap_key_data(loaded[_name(key_path)], impl=jax.random.key_impl(old))
        if _is_key(old)
        else loaded[_name(key_path)]
        for key_path, old in flat
    ]
    return eqx.combine(jax.tree.unflatten(structure, restored), rest)


def _beside(folder: Path, role: str) -> Path:
    """Where a checkpoint lies that is not, or no longer, the one at `folder`: a rename away."""
    return folder.with_name(f".{role}-{folder.name}")


def _saved_at(folder: Path) -> Path:
    """Where the newest whole checkpoint lies: beside `folder` if a save was killed between its two
    renames.
    """
    replaced = _beside(folder, "replaced")
    return replaced if not folder.is_dir() and replaced.is_dir() else folder


def _publish(folder: Path) -> None:
    """Put the checkpoint that was saved beside `folder` in its place."""
    replaced = _beside(folder, "replaced")
    if folder.exists():
        # Of a save that was killed before it had removed it.
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    _beside(folder, "saving").rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_leaves(
    folder: Path, saved: dict[str, Any], target: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Refuse what Orbax would cast: a rounded state is not the one that was saved."""
    for name, wanted in target.items():
        found = saved.get(name)  # where it is None, Orbax says what is missing
        if found is not None and (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise ValueError(
                f"{folder} holds {name} as {found.dtype}{list(found.shape)}, but the state to load "
                f"it into has {wanted.dtype}{list(wanted.shape)}; make that with models of the "
                "same sizes and types (param_dtype of from_pretrained)."
            )


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(key_path: tuple) -> str:
    return jax.tree_util.keystr(key_path)


def _storable(arrays: PyTree) -> dict[str, jax.Array]:
    """Path in the tree -> array, so that a checkpoint can be read without our classes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {_name(key_path): jax.random.key_data(x) if _is_key(x) else x for key_path, x in flat}
