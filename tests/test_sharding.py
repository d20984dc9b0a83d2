"""The table of axes, that its constraints act on CPU devices, and what a mesh exchanges."""

import functools
import re
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ppo_kernel import sharding
from ppo_kernel.config import Hyperparams
from ppo_kernel.evaluation import ModelReward
from ppo_kernel.learner.state import Learner
from ppo_kernel.program import compile_iteration


def test_names_come_from_the_table():
    mesh = sharding.make_mesh(8, data=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    spec = functools.partial(sharding.partition_spec, mesh)
    assert spec("batch", "sequence") == PartitionSpec(("data", "fsdp"))
    assert spec("vocab", "embed") == PartitionSpec("tensor")
    assert spec("parameter", "mlp") == PartitionSpec("fsdp", "tensor")
    assert spec(None, "parameter") == PartitionSpec(None, "fsdp")
    assert spec() == PartitionSpec()
    with pytest.raises(ValueError, match="unknown logical axis 'bacth'"):
        spec("bacth")
    with pytest.raises(ValueError, match="one mesh axis twice"):
        spec("batch", "parameter")
    with pytest.raises(ValueError, match="asked for 9 devices"):
        sharding.make_mesh(9)
    with pytest.raises(ValueError, match="8 devices do not divide into data=3"):
        sharding.make_mesh(8, data=3)
    rows = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("rows",))
    with pytest.raises(ValueError, match=r"axes \('rows',\), but a batch lies along"):
        sharding.place(jnp.zeros(2), rows, "batch")


def test_every_row_of_the_table_names_axes_that_a_mesh_has():
    assert {axis for row in sharding.AXES.values() for axis in row} == set(sharding.MESH_AXES)
    assert set(sharding.make_mesh(8).axis_names) == set(sharding.MESH_AXES)


def test_a_batch_is_split_by_its_leading_axis():
    mesh = sharding.make_mesh(4)
    batch = sharding.place({"x": jnp.zeros((8, 3)), "y": "kept"}, mesh, "batch")
    assert [shard.data.shape for shard in batch["x"].addressable_shards] == [(2, 3)] * 4
    assert batch["y"] == "kept"
    assert sharding.place(batch, None, "batch") is batch
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 4 devices"):
        sharding.place(jnp.zeros(6), mesh, "batch")


def test_parameters_are_split_along_the_first_axis_that_divides():
    mesh = sharding.make_mesh(4)
    parts = {(2, 8, 12): (2, 2, 12), (8, 6): (2, 6), (3, 5): (3, 5), (): (), (0, 4): (0, 1)}
    arrays = [jnp.zeros(shape) for shape in parts]
    placed = sharding.place(arrays, mesh, "parameter")
    assert [x.addressable_shards[0].data.shape for x in placed] == list(parts.values())
    assert all(x.sharding.is_fully_replicated for x in sharding.place(placed, mesh, None))
    with pytest.raises(ValueError, match="or None as logical axis, got 'paramter'"):
        sharding.place(arrays, mesh, "paramter")


class Matrix(eqx.Module):
    """A model that names the axes of its parameter."""

    weight: Float[Array, "*layers in out"]

    def logical_axes(self):
        return {"weight": ("embed", "mlp")}


def test_a_parameter_lies_along_the_axes_that_its_module_names():
    mesh = sharding.make_mesh(8, tensor=2)
    models = {"a": Matrix(jnp.zeros((3, 12, 6))), "odd": [Matrix(jnp.zeros((16, 6, 5)))]}
    moments = optax.scale_by_adam().init(models)
    for tree in (models, moments.mu, eqx.filter(models, eqx.is_inexact_array)):
        placed = sharding.place(tree, mesh, "parameter")
        # Layers are stacked before the axes that are named.
        assert placed["a"].weight.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        # 5 does not divide over 2 devices, and 16 is the first that divides over 4.
        assert placed["odd"][0].weight.sharding.spec == PartitionSpec("fsdp")


def test_a_transformer_names_the_axes_of_its_matrices():
    mesh = sharding.make_mesh(8, tensor=2)
    model = sharding.place(tiny.language_model(vocab_size=14), mesh, "parameter")
    block = model.trunk.blocks
    cut = {
        "heads": (block.attention.query.weight, 2), "kv_heads": (block.attention.value.weight, 2),
        "output": (block.attention.output.weight, 1), "mlp": (block.mlp.up.weight, 2),
        "down": (block.mlp.down.weight, 1), "vocab": (model.trunk.embedding, 0),
        "unembed": (model.output, 0),
    }  # fmt: skip
    for name, (x, axis) in cut.items():
        assert x.sharding.spec[axis] == "tensor", (name, x.sharding.spec)
        assert "fsdp" in x.sharding.spec, (name, x.sharding.spec)


def test_the_verbs_act_inside_a_program_that_entered_a_mesh():
    mesh = sharding.make_mesh(8)

    def result(verb, x):
        with sharding.entered(mesh):
            return jax.jit(lambda x: verb(2 * x))(x)

    batch = result(sharding.shard_batch, jnp.zeros((16, 2)))
    assert batch.sharding.spec == PartitionSpec("fsdp")
    assert result(sharding.gather, batch).sharding.is_fully_replicated
    assert result(sharding.at_rest, jnp.zeros((3, 8))).sharding.spec == PartitionSpec(None, "fsdp")
    with sharding.entered(mesh):
        assert sharding.num_shards("batch") == 8
        # Outside of jit too, from wherever an array is.
        assert sharding.shard_batch(jnp.zeros((16, 2))).sharding.spec == PartitionSpec("fsdp")


def test_the_verbs_do_nothing_without_a_mesh():
    tree = {"x": jnp.zeros((3, 2)), "y": "kept"}
    for verb in (sharding.shard_batch, sharding.gather, sharding.at_rest):
        assert verb(tree) is tree
    assert sharding.num_shards("batch") == 1
    with sharding.entered(None):
        assert sharding.num_shards("batch") == 1


def test_moments_lie_as_the_models_do_from_the_start():
    mesh = sharding.make_mesh(8)
    models = sharding.place((tiny.language_model(), tiny.value_model()), mesh, "parameter")
    state = Learner().init(*models, jax.random.key(3), Hyperparams())
    for model, moments in zip(
        models, (state.actor_optimizer_state, state.critic_optimizer_state), strict=True
    ):
        expected = jax.tree.map(lambda x: x.sharding, model)
        assert jax.tree.map(lambda x: x.sharding, moments.mu) == expected
        assert jax.tree.map(lambda x: x.sharding, moments.nu) == expected


def _on_mesh(mesh):
    """A compiled iteration for the mesh, and its arguments."""
    hyperparams, reference = Hyperparams(), tiny.language_model(seed=8)
    state = sharding.place(tiny.start(hyperparams), mesh, "parameter")
    compiled = compile_iteration(config=tiny.iteration_config(num_minibatches=1), mesh=mesh)
    return compiled, (
        state,
        sharding.place(reference, mesh, "parameter"),
        sharding.place(tiny.prompts(), mesh, "batch"),
        sharding.place(hyperparams, mesh, "parameter"),
        sharding.place(ModelReward(tiny.value_model(seed=9)), mesh, "parameter"),
    )


@pytest.mark.parametrize("axis", ["parameter", None], ids=["split before", "copied before"])
def test_a_device_keeps_its_part_of_models_and_moments(axis):
    mesh = sharding.make_mesh(8)
    compiled, (state, *others) = _on_mesh(mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)
    state, _ = compiled.step(sharding.place(state, mesh, axis), *others)
    assert jax.tree.map(lambda x: x.sharding, state) == placed
    for path, x in jax.tree.leaves_with_path(state):
        divides = any(size % 8 == 0 for size in x.shape)
        part = x.addressable_shards[0].data.size
        assert part * 8 == x.size if divides else part == x.size, jax.tree_util.keystr(path)


def test_each_model_is_gathered_where_it_runs_and_nothing_else_of_its_size_is_exchanged():
    compiled, arguments = _on_mesh(sharding.make_mesh(8))
    state, reference, *_, reward = arguments
    text = compiled.lower(*arguments).compile().as_text()
    exchanges = re.findall(r"= (.*) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    assert {kind for _, kind in exchanges} == {"all-gather", "all-reduce"}
    gathered = Counter(
        tuple(int(n) for n in dimensions.split(",") if n)
        for shape, kind in exchanges
        for dimensions in re.findall(r"\w+\[([\d,]*)\]", shape)
        if kind == "all-gather"
    )
    # The policy samples, and steps; the critic scores, and steps; the others score.
    models = (state.policy, state.policy, state.critic, state.critic, reference, reward)
    expected = Counter(
        x.shape for x in jax.tree.leaves(models) if any(size % 8 == 0 for size in x.shape)
    )
    tokens_and_numbers_of_a_batch = 8 * 5
    rest = gathered - expected
    assert expected - gathered == Counter()
    assert all(np.prod(shape) <= tokens_and_numbers_of_a_batch for shape in rest), rest
