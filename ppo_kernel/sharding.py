"""One table: logical axis -> mesh axis. The only file that knows what a mesh looks like."""

from collections.abc import Callable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

MESH_AXES: dict[str, str | None] = {
    "batch": "data",  # prompts, sequences, and the sequences of a micro-batch: the leading axis
    "parameter": "data",  # models and optimizer moments: the first axis that divides
}
"""Logical axis -> mesh axis, or None for replicated. A new mesh axis is one row.

A device keeps its part of every model and moment, and steps that part (Rajbhandari et al. 2020,
sec. 5). A stage gathers the model that it runs, once.
"""


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
    axes = [None if name is None else _mesh_axis(name) for name in logical_axes]
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical_axes} map to {axes}: one mesh axis twice.")
    # Trailing replicated axes are left out, so that a rank-0 array can be replicated too.
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))


def shards(mesh: Mesh | None, logical_axis: str) -> int:
    """Into how many parts the mesh splits what lies by row `logical_axis`; 1 without a mesh.

    Raises:
        ValueError: an unknown logical axis, or one whose mesh axis the mesh has not.
    """
    axis = _mesh_axis(logical_axis)
    if mesh is None or axis is None:
        return 1
    if axis not in mesh.shape:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, but {logical_axis!r} lies along {axis!r}: "
            "name one so, or change that row of MESH_AXES."
        )
    return mesh.shape[axis]


def sharding_of(shape: tuple[int, ...], mesh: Mesh, logical_axis: str | None) -> NamedSharding:
    """How an array lies on the mesh: a batch by its leading axis, others by the first that divides.

    An array of which no axis divides over the devices is replicated, unless it is a batch.

    Args:
        shape: of the array.
        mesh: the devices.
        logical_axis: the row of the table; None for a copy on every device.

    Returns:
        The sharding for `jax.device_put` or a constraint.

    Raises:
        ValueError: an unknown logical axis.
    """
    if logical_axis is None or logical_axis == "batch":
        return named_sharding(mesh, logical_axis)
    count = shards(mesh, logical_axis)
    dividing = [i for i, size in enumerate(shape) if size and size % count == 0]
    if count == 1 or not dividing:
        return named_sharding(mesh)
    return named_sharding(mesh, *[None] * dividing[0], logical_axis)


def pin(mesh: Mesh | None, logical_axis: str | None) -> Callable[[PyTree], PyTree]:
    """Inside a program: pin every array of a tree to the mesh, as the table says.

    The same constraint acts on CPU devices as on any.

    Args:
        mesh: None leaves the tree alone.
        logical_axis: the row of the table; None for a copy on every device.

    Returns:
        The function from a tree to the pinned tree.
    """
    if mesh is None:
        return lambda tree: tree

    def constrained(x):
        return jax.lax.with_sharding_constraint(x, sharding_of(x.shape, mesh, logical_axis))

    def apply(tree: PyTree) -> PyTree:
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.tree.map(constrained, arrays), rest)

    return apply


def place(tree: PyTree, mesh: Mesh | None, logical_axis: str | None) -> PyTree:
    """Outside a program: put the arrays of a tree on the mesh, as the table says.

    Args:
        tree: arrays, and anything else, which stays as it is.
        mesh: None leaves the tree alone.
        logical_axis: the row of the table; None for a copy on every device.

    Returns:
        The same tree, its arrays on the devices of the mesh.

    Raises:
        ValueError: an unknown logical axis, or a batch that does not divide over the devices of
            its mesh axis.
    """
    if mesh is None:
        return tree
    arrays, rest = eqx.partition(tree, eqx.is_array)
    if logical_axis == "batch":
        count = shards(mesh, "batch")
        for x in jax.tree.leaves(arrays):
            if x.shape[0] % count:
                raise ValueError(
                    f"a batch of {x.shape[0]} does not divide over {count} devices of mesh axis "
                    f"{MESH_AXES['batch']!r}; pass a multiple of {count}."
                )
    shardings = jax.tree.map(lambda x: sharding_of(x.shape, mesh, logical_axis), arrays)
    return eqx.combine(jax.device_put(arrays, shardings), rest)


def _mesh_axis(logical_axis: str) -> str | None:
    if logical_axis not in MESH_AXES:
        raise ValueError(f"unknown logical axis {logical_axis!r}; known: {sorted(MESH_AXES)}.")
    return MESH_AXES[logical_axis]
