"""Saving models: whoever reads them, and a disk that is full."""

import os
import resource
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make_lm, word_tokenizer

from ppo_kernel.io.checkpoint import load_checkpoint, save_checkpoint
from ppo_kernel.trainer.pretrained import CausalLM


def state(value):
    return {"w": jnp.full((100, 100), float(value))}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_saved_files_have_the_mode_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        make_lm(tokenizer=word_tokenizer()).save_pretrained(tmp_path / "policy")
        save_checkpoint(tmp_path / "checkpoint", state(3))
    finally:
        os.umask(before)
    files = [x for x in tmp_path.rglob("*") if x.is_file()]
    modes = {x.name: oct(stat.S_IMODE(x.stat().st_mode)) for x in files}
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


@pytest.fixture
def small_disk():
    """No file grows beyond 2 kB."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(error, path):
    (line,) = str(error.value).splitlines()
    return line.startswith(f"cannot save {path}: ") and "saved before is as it was" in line


def embedding(folder):
    return np.asarray(CausalLM.from_pretrained(folder).model.trunk.embedding)


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, request):
    first, folder = make_lm(tokenizer=word_tokenizer()), tmp_path / "policy"
    first.save_pretrained(folder)
    second = first.with_model(jax.tree.map(lambda x: 2 * x, first.model))
    enough_space = request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match="cannot save") as error:
        second.save_pretrained(folder)
    assert one_line(error, folder)
    enough_space()
    np.testing.assert_array_equal(embedding(folder), first.model.trunk.embedding)
    assert not [x for x in folder.iterdir() if x.name.startswith(".")]
    second.save_pretrained(folder)
    np.testing.assert_array_equal(embedding(folder), second.model.trunk.embedding)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, request):
    path = tmp_path / "checkpoint"
    # Values that a compressed file does not shrink.
    states = [{"w": jax.random.normal(jax.random.key(i), (100, 100))} for i in range(3)]
    save_checkpoint(path, states[0])
    enough_space = request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match="cannot save") as error:
        save_checkpoint(path, states[1])
    assert one_line(error, path)
    enough_space()
    np.testing.assert_array_equal(load_checkpoint(path, state(0))["w"], states[0]["w"])
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint"]
    save_checkpoint(path, states[2])
    np.testing.assert_array_equal(load_checkpoint(path, state(0))["w"], states[2]["w"])
