"""The table of axes, and that its constraints really act on CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from ppo_kernel import sharding


def test_names_come_from_the_table():
    mesh = sharding.make_mesh(4)
    assert sharding.named_sharding(mesh, "batch", None).spec == PartitionSpec("data")
    assert sharding.named_sharding(mesh, "parameter").spec == PartitionSpec()
    with pytest.raises(ValueError, match="unknown logical axis 'bacth'"):
        sharding.named_sharding(mesh, "bacth")
    with pytest.raises(ValueError, match="one mesh axis twice"):
        sharding.named_sharding(mesh, "batch", "batch")
    with pytest.raises(ValueError, match="asked for 9 devices"):
        sharding.make_mesh(9)


def test_placing_splits_batches_and_copies_parameters():
    mesh = sharding.make_mesh(4)
    batch = sharding.place({"x": jnp.zeros((8, 3))}, mesh, "batch")["x"]
    assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 3)] * 4
    scalar, weight = sharding.place((jnp.zeros(()), jnp.zeros((8, 3))), mesh, "parameter")
    assert scalar.sharding.is_fully_replicated
    assert weight.sharding.is_fully_replicated
    assert sharding.place(batch, None, "batch") is batch
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 4 devices"):
        sharding.place(jnp.zeros(6), mesh, "batch")


def test_pins_act_inside_a_program():
    mesh = sharding.make_mesh(8)
    pinned = jax.jit(lambda x: sharding.pin_batch(mesh)(2 * x))(jnp.zeros((16, 2)))
    assert pinned.sharding.spec == PartitionSpec("data")
    copied = jax.jit(lambda x: sharding.pin_parameters(mesh)(2 * x))(pinned)
    assert copied.sharding.is_fully_replicated
    assert sharding.pin_batch(None)("anything") == "anything"
