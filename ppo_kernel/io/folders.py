"""Model folders: reading their JSON files, and replacing their files as late as possible."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def existing_folder(path: str | os.PathLike) -> Path:
    """The folder at `path`.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(path)!r}. Models are read from disk and never downloaded: fetch the "
            "checkpoint first, then pass the folder with its config.json."
        )
    return folder


def has_weights(path: str | os.PathLike) -> bool:
    """Whether `staged` has finished a model folder at `path`."""
    return any((Path(path).expanduser() / name).is_file() for name in (WEIGHTS, INDEX))


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `default` stands in for a missing file.

    Raises:
        FileNotFoundError: no file and no default.
        ValueError: the file is not a JSON object.
    """
    if not path.is_file() and default is not None:
        return default
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is not a model folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def staged(path: str | os.PathLike) -> Iterator[Path]:
    """A scratch folder; on success its files replace those of the same name at `path`.

    A failure or a kill while the files are written leaves what was at `path` as it was. Other
    files there stay, except weights that the new ones supersede.

    Raises:
        OSError: the files cannot be written, as on a full disk.
    """
    folder = Path(path).expanduser()
    with not_saved(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, so that moving a file is a rename, never a copy between file systems.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            scratch = Path(name)
            yield scratch
            _publish(scratch, folder)


@contextmanager
def not_saved(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Says in one line that `path` could not be written, and that the save before it is kept.

    Args:
        path: of the folder that is saved.
        others: what else than OSError the writer raises for a full disk.

    Raises:
        OSError: in the place of the error.
    """
    try:
        yield
    except (OSError, SafetensorError, *others) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"cannot save {path}: {reason}. What was saved before is as it was; free space, or "
            "make the folder writable, and save again."
        ) from error


def _publish(scratch: Path, folder: Path) -> None:
    new = {file.name for file in scratch.iterdir()}
    entry = INDEX if INDEX in new else WEIGHTS
    if entry == INDEX:
        # Shards are replaced one by one: without the old index nobody can read a mixture.
        (folder / INDEX).unlink(missing_ok=True)
    # What a loader looks for comes last: a folder that has it is complete.
    for file in sorted(new, key=lambda file: file == entry):
        os.replace(scratch / file, folder / file)
    if entry in new:
        for old in (*folder.glob("model*.safetensors"), folder / INDEX):
            if old.name not in new:
                old.unlink(missing_ok=True)
