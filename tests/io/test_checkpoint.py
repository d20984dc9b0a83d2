"""Checkpoints: whole or not at all, wherever a save stops, and never rounded on the way back."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ppo_kernel.io.checkpoint import load_checkpoint, save_checkpoint


def state(value: float, dtype="float32"):
    """Arrays, a key and something that is no array."""
    return {
        "weights": jnp.full((3, 2), value, dtype),
        "key": jax.random.key(int(value)),
        "name": "kept",
    }


def loaded_value(folder) -> float:
    """What the checkpoint at `folder` holds, which must be one state throughout."""
    loaded = load_checkpoint(folder, state(0.0))
    value = float(loaded["weights"][0, 0])
    np.testing.assert_array_equal(loaded["weights"], np.full((3, 2), value))
    assert jnp.array_equal(
        jax.random.key_data(loaded["key"]), jax.random.key_data(jax.random.key(int(value)))
    )
    assert loaded["name"] == "kept"
    return value


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def killed_at(monkeypatch, owner, name: str, call: int):
    """The `call`-th call of `owner.name` is the last thing that happens."""
    original, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.parametrize(
    ("owner", "name", "call", "survivor"),
    [
        (ocp.StandardCheckpointHandler, "async_save", 1, 1.0),
        (Path, "rename", 1, 1.0),
        (Path, "rename", 2, 1.0),
        (shutil, "rmtree", 2, 2.0),
    ],
    ids=["while it writes", "before the old one is away", "between", "before the old one is gone"],
)
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, owner, name, call, survivor
):
    folder = tmp_path / "run" / "checkpoint"
    save_checkpoint(folder, state(1.0))
    with monkeypatch.context() as patch:
        killed_at(patch, owner, name, call)
        with pytest.raises(Killed):
            save_checkpoint(folder, state(2.0))
    assert loaded_value(folder) == survivor
    save_checkpoint(folder, state(3.0))
    assert loaded_value(folder) == 3.0
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_link_to_a_checkpoint_stays_one(tmp_path):
    save_checkpoint(tmp_path / "first", state(1.0))
    (tmp_path / "latest").symlink_to(tmp_path / "first")
    save_checkpoint(tmp_path / "latest", state(2.0))
    assert loaded_value(tmp_path / "first") == loaded_value(tmp_path / "latest") == 2.0


@pytest.mark.parametrize(("saved", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_checkpoint_of_another_type_is_refused(tmp_path, saved, wanted):
    save_checkpoint(tmp_path / "checkpoint", state(1.0, saved))
    with pytest.raises(ValueError, match=rf"\['weights'\] as {saved}.* has {wanted}.*param_dtype"):
        load_checkpoint(tmp_path / "checkpoint", state(0.0, wanted))


def test_another_structure_or_shape_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", state(1.0))
    with pytest.raises(ValueError, match="other"):
        load_checkpoint(tmp_path / "checkpoint", state(0.0) | {"other": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"float32\[3, 2\], but .* float32\[2, 2\]"):
        load_checkpoint(tmp_path / "checkpoint", state(0.0) | {"weights": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere", state(0.0))
