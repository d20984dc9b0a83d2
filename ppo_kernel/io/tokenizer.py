"""A tokenizer from a model folder, without transformers; and left padding of prompts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from .folders import existing_folder, read_json, write_json

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text <-> token ids.

    Two are equal if an id means the same to both and they cut texts alike; what they put around
    a text (BOS) may differ, and how their files are written.

    Attributes:
        backend: of the `tokenizers` library; its padding and truncation are switched off.
        settings: tokenizer_config.json; the special tokens' names are read from it.
        files: other files of the folder that `save` writes again, name -> text.
    """

    backend: tokenizers.Tokenizer
    settings: dict[str, Any]
    files: dict[str, str]

    def __post_init__(self):
        self.backend.no_padding()
        self.backend.no_truncation()

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """The tokenizer of a folder: tokenizer.json and what describes its special tokens.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: it has no tokenizer.json, or a damaged one.
        """
        folder = existing_folder(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json. If it has a tokenizer in another format, load "
                "it with transformers' AutoTokenizer and save_pretrained it again."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"cannot read {file}: {error}.") from error
        special = read_json(folder / _SPECIAL, {})
        settings = special | read_json(folder / _CONFIG, {})
        kept = (folder / name for name in (_SPECIAL, _TEMPLATE))
        files = {p.name: p.read_text(encoding="utf-8") for p in kept if p.is_file()}
        return cls(backend, settings, files)

    @classmethod
    def of(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        pad_token: str | None = None,
        bos_token: str | None = None,
    ) -> "Tokenizer":
        """A tokenizer of your own.

        Raises:
            ValueError: a special token is not in its vocabulary.
        """
        tokens = {"eos_token": eos_token, "pad_token": pad_token, "bos_token": bos_token}
        tokens = {name: token for name, token in tokens.items() if token is not None}
        for name, token in tokens.items():
            if backend.token_to_id(token) is None:
                raise ValueError(f"{name}={token!r} is not in the vocabulary; add it first.")
        return cls(backend, {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}, {})

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text.

        Args:
            texts: a list, not one string.
            add_special_tokens: put BOS, or what the tokenizer's own rules add, around each text;
                false for the continuation of a text, or one with its special tokens spelled out.

        Raises:
            ValueError: `texts` is one string.
        """
        if isinstance(texts, str):
            raise ValueError(f"encode takes a list of texts, got one string: [{texts!r}] is meant?")
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = True) -> str:
        """The text of some ids, special tokens left out by default."""
        return self.backend.decode([index(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int:
        """Id of a token of the vocabulary.

        Raises:
            ValueError: there is no such token.
        """
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the vocabulary has no token {token!r}.")
        return token_id

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token."""
        return self._special_id("pad_token")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that starts a text."""
        return self._special_id("bos_token")

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest id: what an embedding must hold."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def save(self, path) -> None:
        """Write it into the existing folder `path`, for us and for transformers' AutoTokenizer."""
        folder = existing_folder(path)
        self.backend.save(str(folder / "tokenizer.json"))
        write_json(folder / _CONFIG, self.settings)
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._rules == other._rules

    def __hash__(self) -> int:
        return hash(self._rules)

    def __repr__(self) -> str:
        return f"Tokenizer({self.num_ids} ids, eos_id={self.eos_id}, pad_id={self.pad_id})"

    @cached_property
    def _rules(self) -> str:
        rules = json.loads(self.backend.to_str())
        added = [[token["id"], token["content"]] for token in rules["added_tokens"]]
        parts = [rules[key] for key in ("model", "normalizer", "pre_tokenizer", "decoder")]
        return json.dumps([sorted(added), *parts], sort_keys=True)

    def _special_id(self, name: str) -> int | None:
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self.backend.token_to_id(token)


def left_pad(
    sequences: Sequence[Sequence[int]], *, pad_id: int, width: int | None = None
) -> tuple[Int[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
    """Ragged ids -> a rectangle with the padding on the left.

    Args:
        sequences: N lists of ids, none empty.
        pad_id: what unused slots hold; any id.
        width: P; None takes the longest sequence's.

    Returns:
        (tokens, mask of the slots that hold one).

    Raises:
        ValueError: there is no sequence, an empty one, or one longer than `width`.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        where = f"sequence {lengths.index(0)} is empty" if lengths else "there are no sequences"
        raise ValueError(f"nothing to pad: {where}.")
    width = max(lengths) if width is None else width
    if max(lengths) > width:
        raise ValueError(
            f"sequence {lengths.index(max(lengths))} has {max(lengths)} tokens, more than "
            f"width={width}; truncate it or raise the width."
        )
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    tokens = np.full((len(lengths), width), pad_id, np.int32)
    tokens[mask] = np.concatenate([np.asarray(sequence, np.int32) for sequence in sequences])
    return tokens, mask
