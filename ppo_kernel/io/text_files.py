"""Text files of training data: JSON lines; every mistake is reported by file and line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A row of supervised fine-tuning.

    Attributes:
        prompt: context only; None where the whole text is imitated.
        response: the text after the prompt, or the whole text.
    """

    prompt: str | None
    response: str


@dataclass(frozen=True)
class Preference:
    """A prompt with a preferred and a rejected response."""

    prompt: str
    chosen: str
    rejected: str


def read_prompts(path: str | PathLike) -> list[str]:
    """Prompts: rows {"prompt": str}, or one prompt per line where the file's name ends in .txt.

    Raises:
        ValueError: no such file, or a row of another kind: names file, line and remedy.
    """
    if Path(path).suffix == ".txt":
        return _rows(path, _text)
    return _rows(path, lambda line: _string(_object(line), "prompt"))


def read_examples(path: str | PathLike) -> list[Example]:
    """Rows {"prompt": str, "response": str}, or {"text": str}. Raises as `read_prompts`."""

    def parse(line: bytes) -> Example:
        row = _object(line)
        if "text" in row and "response" not in row:
            return Example(None, _string(row, "text"))
        if "prompt" not in row and "response" not in row:
            raise ValueError(f'has {_keys(row)}; give it "prompt" and "response", or "text" alone')
        return Example(_string(row, "prompt"), _string(row, "response"))

    return _rows(path, parse)


def read_preferences(path: str | PathLike) -> list[Preference]:
    """Rows {"prompt": str, "chosen": str, "rejected": str}. Raises as `read_prompts`."""

    def parse(line: bytes) -> Preference:
        row = _object(line)
        pair = Preference(*(_string(row, key) for key in ("prompt", "chosen", "rejected")))
        if pair.chosen == pair.rejected:
            raise ValueError('has the same text as "chosen" and "rejected"; leave the row out')
        return pair

    return _rows(path, parse)


def _rows(path: str | PathLike, parse: Callable[[bytes], T]) -> list[T]:
    """Every line that is not blank, parsed; all of them are read before the first is refused."""
    rows, wrong = [], []
    for number, line in _lines(Path(path)):
        try:
            rows.append(parse(line))
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f" ({len(wrong) - 1} more lines are wrong)" if len(wrong) > 1 else ""
        raise ValueError(f"{path}, {wrong[0]}.{more}")
    if not rows:
        raise ValueError(f"{path} has no rows; write one per line.")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; check the path.")
    # Bytes: `str.splitlines` also splits at other characters, and a line that is not UTF-8 must
    # have a number too.
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _text(line: bytes) -> str:
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(_text(line))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not JSON ({error.msg}, column {error.colno}); write one object per line"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f'holds a {type(row).__name__}; write an object such as {{"prompt": ...}}')
    return row


def _string(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f'has no "{key}", only {_keys(row)}; add it')
    value = row[key]
    if isinstance(value, list | dict):
        raise ValueError(
            f'"{key}" is a {type(value).__name__}; make it a string, chat messages by the '
            "chat template of the model"
        )
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is {json.dumps(value)}; make it a string')
    if not value.strip():
        raise ValueError(f'"{key}" is empty; leave the row out')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f'"{key}" has half of a surrogate pair; leave it out') from None
    return value


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in row) or "nothing"
