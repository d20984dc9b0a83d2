"""Weights of a Hugging Face folder -> arrays of a model, and back; one file or shards."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..models.families.family import Weight
from .folders import INDEX, WEIGHTS, read_json

SHARD_BYTES = 5 * 2**30
"""A file of weights larger than this is split: loaders and file systems like it so."""

_FLOATS = {"F64", "F32", "F16", "BF16"}
_BUFFERS = ("rotary_emb.inv_freq",)


class WeightFiles:
    """The tensors of a folder, read one by one; a context manager, since it keeps files open.

    The index decides which shard holds a tensor: one that it does not name there is not read.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.

    Raises:
        ValueError: there are no such files, or they are damaged, or a shard lacks a tensor.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        with ExitStack() as stack:
            self._files = {}
            for path, names in _tensors_of_files(folder).items():
                try:
                    file = stack.enter_context(safe_open(path, framework="numpy"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"cannot read {path}: {error}. Fetch it again.") from error
                lost = [] if names is None else sorted(names - set(file.keys()))
                if lost:
                    raise ValueError(
                        f"{path} lacks {_some(lost)}, which {INDEX} says it holds: fetch both "
                        "files again."
                    )
                self._files |= dict.fromkeys(file.keys() if names is None else names, file)
            self._stack = stack.pop_all()

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._files)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor, which must have floats in that shape. Raises ValueError where it does not."""
        view = self._files[name].get_slice(name)
        found, kind = tuple(view.get_shape()), view.get_dtype()
        if found != shape:
            raise ValueError(
                f"tensor {name!r} in {self.folder} has shape {list(found)}, but config.json "
                f"implies {list(shape)}; they are not of the same model."
            )
        if kind not in _FLOATS:
            raise ValueError(
                f"tensor {name!r} in {self.folder} has type {kind}, supported are "
                f"{sorted(_FLOATS)}; dequantize the checkpoint and save it again."
            )
        return self._files[name].get_tensor(name)

    def differ(self, left: str, right: str) -> bool:
        """Whether two tensors, if both are there, have other shapes or values."""
        if not {left, right} <= self.names:
            return False
        x, y = (self._files[name].get_tensor(name) for name in (left, right))
        return not np.array_equal(x, y)


def load_weights(
    files: WeightFiles, like: Any, weights: Iterable[Weight], *, ignored: Iterable[str] = ()
) -> Any:
    """Fill a model from a folder.

    Args:
        files: the folder's tensors.
        like: the model, with a `jax.ShapeDtypeStruct` for each array; their types are those of
            the result, whatever the folder has.
        weights: which tensor goes where; all of `like`.
        ignored: tensors that may be there and are left unread.

    Returns:
        `like` with arrays.

    Raises:
        ValueError: a tensor is missing, unread, or has another shape or no float type.
    """
    weights = tuple(weights)
    expected = {name for weight in weights for name in _names(weight, weight.find(like))}
    missing = sorted(expected - files.names)
    unread = sorted(
        name for name in files.names - expected - set(ignored) if not name.endswith(_BUFFERS)
    )
    if missing or unread:
        raise ValueError(
            f"the tensors in {files.folder} are not those of this kind of model: "
            f"missing {_some(missing)}; not expected {_some(unread)}. Check model_type, "
            "architectures and tie_word_embeddings in its config.json."
        )
    arrays = [_read(files, weight, weight.find(like)) for weight in weights]
    return eqx.tree_at(lambda model: [weight.find(model) for weight in weights], like, arrays)


def save_weights(
    folder: Path,
    model: Any,
    like: Any,
    weights: Iterable[Weight],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors into `folder`, so that PyTorch's loaders read them.

    Args:
        folder: exists and has no weights yet; see `io.folders.staged`.
        model: what to write.
        like: what `load_weights` will read it into.
        weights: which array becomes which tensor.
        shard_bytes: tensors are split over files of about this size.

    Raises:
        ValueError: `model` has other parts, shapes or types than `like`.
    """
    _check_alike(model, like)
    files: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        files.append(list(pending))
        part = folder / _part(len(files))
        part.touch()
        mode = part.stat().st_mode
        metadata = {"format": "pt"}  # transformers refuses files without it
        save_file(pending, part, metadata=metadata)
        # The library makes files that the user alone may read, whatever the umask.
        part.chmod(mode)
        pending.clear()

    total = 0
    for name, array in _tensors(model, weights):
        if pending and sum(x.nbytes for x in pending.values()) + array.nbytes > shard_bytes:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(files) == 1:
        (folder / _part(1)).rename(folder / WEIGHTS)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        shard = f"model-{number:05}-of-{len(files):05}.safetensors"
        (folder / _part(number)).rename(folder / shard)
        index |= dict.fromkeys(names, shard)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _tensors_of_files(folder: Path) -> dict[Path, set[str] | None]:
    """Each file of weights, and the tensors to be read from it; None for all."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Weights in another format: load them "
            "with transformers and save_pretrained them again."
        )
    shards: dict[str, set[str]] = {}
    for tensor, shard in read_json(folder / INDEX).get("weight_map", {}).items():
        shards.setdefault(shard, set()).add(tensor)
    lost = [shard for shard in sorted(shards) if not (folder / shard).is_file()]
    if lost:
        raise ValueError(f"{folder} lacks {_some(lost)}, named in {INDEX}: fetch all shards.")
    return {folder / shard: shards[shard] for shard in sorted(shards)}


def _names(weight: Weight, leaf: Any) -> list[str]:
    if not weight.stacked:
        return [weight.name]
    return [weight.name.format(layer=layer) for layer in range(leaf.shape[0])]


def _read(files: WeightFiles, weight: Weight, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    shape = weight.checkpoint_shape(leaf.shape)
    # Filled layer by layer: no second copy of a stack, whatever the folder's type.
    array = np.empty(leaf.shape, leaf.dtype)
    rows = array if weight.stacked else array[None]
    for index, name in enumerate(_names(weight, leaf)):
        rows[index] = weight.from_checkpoint(files.read(name, shape))
    return jnp.asarray(array)


def _tensors(model: Any, weights: Iterable[Weight]) -> Iterator[tuple[str, np.ndarray]]:
    for weight in weights:
        leaf = np.asarray(weight.find(model))
        rows = leaf if weight.stacked else leaf[None]
        for name, row in zip(_names(weight, leaf), rows, strict=True):
            # `save_file` writes the buffer as it lies in memory, so a transposed view would be
            # written untransposed.
            yield name, np.ascontiguousarray(weight.to_checkpoint(row))


def _part(number: int) -> str:
    return f"part-{number}"


def _check_alike(model: Any, like: Any) -> None:
    # Parts that no tensor is named after, as adapters, would be dropped in silence.
    if jax.tree.structure(model) != jax.tree.structure(like):
        raise ValueError(
            "the model has other parts than its config says; merge adapters before saving."
        )
    leaves = jax.tree.leaves_with_path(model)
    for (path, x), wanted in zip(leaves, jax.tree.leaves(like), strict=True):
        if (x.shape, x.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} is {x.dtype}{list(x.shape)}, its config "
                f"says {wanted.dtype}{list(wanted.shape)}."
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
