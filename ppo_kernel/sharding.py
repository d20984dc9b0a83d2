"""One table: logical axis -> mesh axis. The only file that knows what a mesh looks like."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

MESH_AXES: dict[str, str | None] = {
    "batch": "data",  # prompts, sequences, and the sequences of a micro-batch
    "parameter": None,  # models and optimizer moments: a copy on every device
}
"""Logical axis -> mesh axis, or None for replicated. A new mesh axis is one row."""

Pin: TypeAlias = Callable[[PyTree], PyTree]
"""A tree of arrays with a leading batch axis -> the same tree, pinned to the mesh."""


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh with the table's data axis over the first `num_devices`, all by default.

    Raises:
        ValueError: more devices are asked for than there are.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"asked for {count} devices, but jax sees {len(devices)}.")
    return Mesh(np.array(devices[:count]), ("data",))


def named_sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    """The sharding of an array whose axes have the names `logical_axes`, None for replicated.

    Raises:
        ValueError: a name is not in the table, or two axes would share a mesh axis.
    """
    unknown = [name for name in logical_axes if name is not None and name not in MESH_AXES]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; known: {sorted(MESH_AXES)}.")
    axes = [None if name is None else MESH_AXES[name] for name in logical_axes]
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical_axes} map to {axes}: one mesh axis twice.")
    # Trailing replicated axes are left out, so that a rank-0 array can be replicated too.
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))


def pin_batch(mesh: Mesh | None) -> Pin:
    """Inside a program: pin the leading axis of every array to the batch axis of the mesh.

    None for `mesh` leaves the tree alone. The same constraint acts on CPU devices as on any.
    """

    def pin(tree: PyTree) -> PyTree:
        if mesh is None:
            return tree
        sharding = named_sharding(mesh, "batch")
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)

    return pin


def pin_parameters(mesh: Mesh | None) -> Pin:
    """Inside a program: pin every array of a state to the table's parameter row.

    None for `mesh` leaves the state alone.
    """

    def pin(tree: PyTree) -> PyTree:
        if mesh is None:
            return tree
        sharding = named_sharding(mesh, "parameter")
        arrays, rest = eqx.partition(tree, eqx.is_array)
        arrays = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), arrays)
        return eqx.combine(arrays, rest)

    return pin


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts the mesh splits a batch; 1 without a mesh."""
    axis = MESH_AXES["batch"]
    return 1 if mesh is None or axis is None else mesh.shape[axis]


def place(tree: PyTree, mesh: Mesh | None, logical_axis: str) -> PyTree:
    """Outside a program: put the arrays of a tree on the mesh, leading axis by the table.

    Args:
        tree: arrays, and anything else, which stays as it is.
        mesh: None leaves the tree alone.
        logical_axis: the row of the table for the leading axis.

    Returns:
        The same tree, its arrays on the devices of the mesh.

    Raises:
        ValueError: an unknown logical axis, or a batch that does not divide over the devices of
            its mesh axis.
    """
    if mesh is None:
        return tree
    sharding = named_sharding(mesh, logical_axis)
    axis = MESH_AXES[logical_axis]
    count = 1 if axis is None else mesh.shape[axis]
    arrays, rest = eqx.partition(tree, eqx.is_array)
    for x in jax.tree.leaves(arrays):
        if count > 1 and x.shape[0] % count:
            raise ValueError(
                f"a batch of {x.shape[0]} does not divide over {count} devices of mesh axis "
                f"{axis!r}; pass a multiple of {count}."
            )
    return eqx.combine(jax.device_put(arrays, sharding), rest)
