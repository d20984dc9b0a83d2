"""One table: logical axis -> mesh axes. The only file that knows what a mesh looks like.

No pure function takes a mesh. The compiled program enters one (`jax.set_mesh`), and the verbs of
this file read it where a function is traced; without a mesh they do nothing:

    shard_batch(tree)   cut every array by its leading axis, the sequences
    gather(tree)        put a copy of every array on each device
    at_rest(tree)       cut parameters and moments, as they lie between the stages
    num_shards("batch") how many parts a batch is cut into

`place` is their counterpart outside of a program, where a mesh is an argument.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, PyTree

MESH_AXES = ("data", "fsdp", "tensor")

AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # prompts, sequences, and the sequences of a micro-batch
    "sequence": (),
    "layers": (),
    "embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "parameter": ("fsdp",),  # the first axis of a parameter that divides, of those not cut yet
}
"""Logical axis -> the mesh axes that cut it; none for a whole axis.

Along `data` and `fsdp` devices share the batch. Along `fsdp` and `tensor` each keeps its part of
every model and moment, and steps that part (Rajbhandari et al. 2020, sec. 5,
https://arxiv.org/abs/1910.02054). A stage gathers the model that it runs, once.
"""


def make_mesh(num_devices: int | None = None, *, data: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first `num_devices`, all by default: what `data` and `tensor` leave is `fsdp`.

    Raises:
        ValueError: more devices are asked for than there are, or they do not divide.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"asked for {count} devices, but jax sees {len(devices)}.")
    if data < 1 or tensor < 1 or count % (data * tensor):
        raise ValueError(f"{count} devices do not divide into data={data} * tensor={tensor}.")
    grid = np.array(devices[:count]).reshape(data, -1, tensor)
    return Mesh(grid, MESH_AXES)


def entered(mesh: Mesh | None) -> AbstractContextManager:
    """The context in which a program for `mesh` is traced and called; None for one device."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def shard_batch(tree: PyTree) -> PyTree:
    """Inside a program: the arrays of `tree` cut by their leading axis, the sequences."""
    return _constrain(tree, lambda tree, mesh: _alike(tree, partition_spec(mesh, "batch")))


def gather(tree: PyTree) -> PyTree:
    """Inside a program: the arrays of `tree`, whole on every device."""
    return _constrain(tree, lambda tree, mesh: _alike(tree, PartitionSpec()))


def at_rest(tree: PyTree) -> PyTree:
    """Inside a program: parameters and moments cut as they lie between the stages.

    Over `tensor` by the axes that a module names in `logical_axes`, where they divide. Over `fsdp`
    by the first axis that divides, whatever its name, so that every array is cut.

    Args:
        tree: models, moments or gradients.

    Returns:
        The same tree; without a mesh the very same.
    """
    return _constrain(tree, _parameter_specs)


def num_shards(logical_axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Into how many parts a mesh cuts a logical axis; 1 without a mesh.

    Args:
        logical_axis: a row of the table.
        mesh: None for the one that the program has entered.

    Returns:
        The product of the sizes of the mesh axes that cut it.

    Raises:
        ValueError: an unknown logical axis, or a mesh without any axis for a batch.
    """
    mesh = get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else prod(mesh.shape[axis] for axis in _mesh_axes(logical_axis, mesh))


def place(tree: PyTree, mesh: Mesh | None, logical_axis: str | None) -> PyTree:
    """Outside a program: put the arrays of a tree on the mesh, as the table says.

    Args:
        tree: arrays, and anything else, which stays as it is.
        mesh: None leaves the tree alone.
        logical_axis: "batch", "parameter", or None for a copy on every device.

    Returns:
        The same tree, its arrays on the devices of the mesh.

    Raises:
        ValueError: another logical axis, or a batch that does not divide over the devices.
    """
    if mesh is None:
        return tree
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, shardings(arrays, mesh, logical_axis)), rest)


def shardings(arrays: PyTree, mesh: Mesh, logical_axis: str | None) -> PyTree[NamedSharding]:
    """How `place` puts arrays, or what has the shape of arrays, on the mesh.

    Args:
        arrays: nothing else is in it.
        mesh: the devices.
        logical_axis: as in `place`.

    Returns:
        A sharding per array, in the same tree.

    Raises:
        ValueError: as `place` does.
    """
    if logical_axis == "batch":
        count = num_shards("batch", mesh)
        for x in jax.tree.leaves(arrays):
            if x.shape[0] % count:
                raise ValueError(
                    f"a batch of {x.shape[0]} does not divide over {count} devices, which share it "
                    f"(mesh axes {AXES['batch']}); pass a multiple of {count}."
                )
        specs = _alike(arrays, partition_spec(mesh, "batch"))
    elif logical_axis == "parameter":
        specs = _parameter_specs(arrays, mesh)
    elif logical_axis is None:
        specs = _alike(arrays, PartitionSpec())
    else:
        raise ValueError(
            f"place takes 'batch', 'parameter' or None as logical axis, got {logical_axis!r}."
        )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def partition_spec(mesh: Mesh | AbstractMesh, *logical_axes: str | None) -> PartitionSpec:
    """How an array lies whose axes have the names `logical_axes`, None for a whole axis.

    Raises:
        ValueError: a name is not in the table, or two axes would share a mesh axis.
    """
    cuts = [() if name is None else _mesh_axes(name, mesh) for name in logical_axes]
    used = [axis for cut in cuts for axis in cut]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical_axes} map to {cuts}: one mesh axis twice.")
    # Trailing whole axes are left out, so that a rank-0 array has a spec too.
    while cuts and not cuts[-1]:
        cuts.pop()
    return PartitionSpec(*[(cut[0] if len(cut) == 1 else cut) if cut else None for cut in cuts])


def _mesh_axes(logical_axis: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of this mesh that cut a logical axis; those of one device cut nothing."""
    if logical_axis not in AXES:
        raise ValueError(f"unknown logical axis {logical_axis!r}; known: {sorted(AXES)}.")
    wanted = AXES[logical_axis]
    if logical_axis == "batch" and not set(wanted) & set(mesh.axis_names):
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, but a batch lies along {wanted}: name one "
            "so, or change that row of sharding.AXES."
        )
    return tuple(axis for axis in wanted if mesh.shape.get(axis, 1) > 1)


def _alike(tree: PyTree, spec: PartitionSpec) -> PyTree[PartitionSpec]:
    return jax.tree.map(lambda x: spec, tree)


def _parameter_specs(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree[PartitionSpec]:
    names = named_axes(tree)

    def cuts(name: str | None, size: int) -> bool:
        return size > 0 and name is not None and size % num_shards(name, mesh) == 0

    def spec(path: tuple, x: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
        named = names.get(path, ())
        # Layers are stacked along axes of their own, before those that a layer names.
        axes = [*[None] * (x.ndim - len(named)), *named]
        axes = [
            name if cuts(name, size) else None for name, size in zip(axes, x.shape, strict=True)
        ]
        whole = [i for i, name in enumerate(axes) if name is None or num_shards(name, mesh) == 1]
        dividing = [i for i in whole if cuts("parameter", x.shape[i])]
        if dividing:
            axes[dividing[0]] = "parameter"
        return partition_spec(mesh, *axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


def named_axes(tree: PyTree) -> dict[tuple, tuple[str | None, ...]]:
    """Path -> logical axes, of every array whose module names them.

    A module does so by a method `logical_axes() -> {field: names of its last axes}`. Moments and
    gradients are made of the same modules, so they lie as their parameters do.

    Args:
        tree: modules, in any containers.

    Returns:
        Paths as `jax.tree_util.tree_map_with_path` gives them.
    """

    def names_axes(node: object) -> bool:
        return hasattr(node, "logical_axes")

    def visit(prefix: tuple, node: PyTree) -> dict[tuple, tuple[str | None, ...]]:
        found = {}
        if names_axes(node):
            own = {jax.tree_util.GetAttrKey(k): axes for k, axes in node.logical_axes().items()}
            found = {(*prefix, key): axes for key, axes in own.items()}
        below, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node and names_axes(x)
        )
        for path, part in below:
            if path and names_axes(part):
                found |= visit((*prefix, *path), part)
        return found

    return visit((), tree)


def _constrain(tree: PyTree, specs: Callable) -> PyTree:
    """The arrays of `tree` constrained to `specs(arrays, mesh)` on the mesh that was entered.

    The same constraint acts on CPU devices as on any.
    """
    mesh = get_abstract_mesh()
    if mesh.empty:
        return tree
    arrays, rest = eqx.partition(tree, eqx.is_array)

    def constrain(spec: PartitionSpec, x: Array) -> Array:
        if isinstance(x, Tracer):
            return jax.lax.with_sharding_constraint(x, spec)
        # An array that is on one device cannot be constrained, but moved.
        return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))

    return eqx.combine(jax.tree.map(constrain, specs(arrays, mesh), arrays, is_leaf=_is_spec), rest)


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)
