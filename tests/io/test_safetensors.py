"""Weight files: what is refused, types, and what a failure or a smaller save leaves behind."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array, Float
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ppo_kernel.io.folders import existing_folder, read_json, staged
from ppo_kernel.io.safetensors import WeightFiles, load_weights, save_weights
from ppo_kernel.models.families.family import Weight


class Toy(eqx.Module):
    """One array of each layout."""

    table: Float[Array, "V D"]
    stack: Float[Array, "L D F"]
    head: Float[Array, " D"]


WEIGHTS = (
    Weight("embed.weight", "table"),
    Weight("layers.{layer}.weight", "stack", "transposed"),
    Weight("score.weight", "head", "row"),
)


def toy(dtype="float32"):
    rng = np.random.default_rng(0)
    return Toy(*(jnp.asarray(rng.normal(size=s), dtype) for s in ((5, 3), (2, 3, 4), (3,))))


def like(dtype="float32"):
    return eqx.filter_eval_shape(lambda: toy(dtype))


def tensors():
    """The checkpoint of `toy`, made by hand."""
    model = jax.tree.map(np.asarray, toy())
    layers = {f"layers.{i}.weight": np.ascontiguousarray(model.stack[i].T) for i in range(2)}
    return {"embed.weight": model.table, "score.weight": model.head[None], **layers}


def load(folder, dtype="float32", **options):
    with WeightFiles(folder) as files:
        return load_weights(files, like(dtype), WEIGHTS, **options)


def save(path, model=None, **options):
    with staged(path) as folder:
        save_weights(folder, toy() if model is None else model, like(), WEIGHTS, **options)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_reads_what_pytorch_writes(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    assert_same(load(tmp_path), toy())


def test_writes_what_pytorch_reads(tmp_path):
    save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same(file.get_tensors(), tensors())


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_types(stored, wanted, tmp_path):
    content = {name: x.astype(stored) for name, x in tensors().items()}
    save_file(content, tmp_path / "model.safetensors")
    loaded = load(tmp_path, wanted)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}
    assert_same(np.asarray(loaded.table), content["embed.weight"].astype(wanted))


def changed(**changes):
    content = {**tensors(), **changes}
    return {name: x for name, x in content.items() if x is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(**{"layers.1.weight": None}), r"missing 'layers\.1\.weight'"),
        (changed(**{"layers.2.weight": np.ones((4, 3))}), r"not expected 'layers\.2\.weight'"),
        (changed(**{"layers.0.bias": np.ones(4)}), r"not expected 'layers\.0\.bias'"),
        (changed(**{"embed.weight": np.ones((6, 3))}), r"'embed.weight'.*\[6, 3\].*\[5, 3\]"),
        (changed(**{"layers.0.weight": np.ones((3, 4))}), r"\[3, 4\].*\[4, 3\]"),
        (changed(**{"score.weight": np.ones((2, 3))}), r"\[2, 3\].*\[1, 3\]"),
        (changed(**{"embed.weight": np.ones((5, 3), np.int8)}), "type I8"),
    ],
)
def test_refusals(content, message, tmp_path):
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_known_extras_are_left_unread(tmp_path):
    extras = {"layers.0.rotary_emb.inv_freq": np.ones(2), "spare.weight": np.ones(2)}
    save_file(tensors() | extras, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, ignored=["spare.weight"]), toy())


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="never downloaded"):
        existing_folder("some-owner/some-model")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        WeightFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot read"):
        WeightFiles(tmp_path)


def test_lost_shard(tmp_path):
    save(tmp_path, shard_bytes=60)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 'model-00002-of-00003\.safetensors'"):
        load(tmp_path)


def shards(path):
    """The names and contents of saved shards, and their index."""
    save(path, shard_bytes=60)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    contents = {name: load_file(path / name) for name in sorted(set(index.values()))}
    return index, contents


def test_index_decides_which_shard_holds_a_tensor(tmp_path):
    index, contents = shards(tmp_path)
    for name, content in contents.items():
        stale = {x: np.full_like(tensors()[x], 7) for x in set(index) - set(content)}
        save_file(content | stale | {"gone.weight": np.ones(2)}, tmp_path / name)
    assert_same(load(tmp_path), toy())


def test_tensor_that_its_shard_lacks_is_refused(tmp_path):
    _, contents = shards(tmp_path)
    (first, content), (second, other) = list(contents.items())[:2]
    moved = sorted(content)[0]
    save_file(
        {x: v for x, v in content.items() if x != moved} | {"spare": np.ones(1)}, tmp_path / first
    )
    save_file(other | {moved: content[moved]}, tmp_path / second)
    with pytest.raises(ValueError, match=rf"{first} lacks '{moved}', which model"):
        load(tmp_path)


def test_tensors_that_differ(tmp_path):
    content = {"a": np.ones(3), "b": np.ones(3), "c": np.zeros(3), "d": np.ones((3, 1))}
    save_file(content, tmp_path / "model.safetensors")
    with WeightFiles(tmp_path) as files:
        assert [files.differ("a", x) for x in "abcde"] == [False, False, True, True, False]


def test_index_names_every_tensor(tmp_path):
    save(tmp_path, shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors().values())


@pytest.mark.parametrize("first", [60, 2**30])
@pytest.mark.parametrize("second", [60, 120, 2**30])
def test_second_save_replaces_the_first(first, second, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save(tmp_path, jax.tree.map(jnp.zeros_like, toy()), shard_bytes=first)
    save(tmp_path, shard_bytes=second)
    assert_same(load(tmp_path), toy())
    fresh = tmp_path / "fresh"
    save(fresh, shard_bytes=second)
    names = {file.name for file in tmp_path.iterdir()} - {"README.md", "fresh"}
    assert names == {file.name for file in fresh.iterdir()}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_failed_save_changes_nothing(tmp_path):
    save(tmp_path)

    def fail():
        with staged(tmp_path) as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load(tmp_path), toy())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (toy("bfloat16"), "bfloat16"),
        (eqx.tree_at(lambda m: m.head, toy(), jnp.ones(4)), r"float32\[4\].*float32\[3\]"),
        (eqx.tree_at(lambda m: m.head, toy(), (jnp.ones(3), jnp.ones(3))), "merge adapters"),
    ],
)
def test_save_refuses_a_changed_model(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(tmp_path, model)
    assert not list(tmp_path.iterdir())
