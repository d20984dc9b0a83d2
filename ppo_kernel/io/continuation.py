"""Encoding text that continues other text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import tokenizers

_CLEAN_UP = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m",
    " 's": "'s", " 've": "'ve", " 're": "'re",
}  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """What a tokenizer's post-processor puts around a text.

    Attributes:
        front: ids before it, such as BOS.
        back: ids after it, such as EOS.
    """

    front: list[int]
    back: list[int]

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "Frame":
        """That of a tokenizer; found by encoding any text of at least one token."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        for text in ("a", *vocabulary):
            encoding = backend.encode(text)
            added = encoding.special_tokens_mask
            if 0 in added:
                start, stop = added.index(0), len(added) - added[::-1].index(0)
                return cls(encoding.ids[:start], encoding.ids[stop:])
        return cls([], [])


class Continuations:
    """Encodes texts as the middle of others.

    Args:
        backend: of the whole tokenizer; a copy is made without the rules that only the start of a
            text calls for: a space or its mark in front.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        rules = json.loads(backend.to_str())
        rules["post_processor"] = None
        for name in ("normalizer", "pre_tokenizer"):
            rules[name] = _without_start(rules[name])
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(rules))
        self._backend.encode_special_tokens = backend.encode_special_tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a text, whatever stands before it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def candidates(self, before: str, text: str) -> Iterator[list[int]]:
        """Ids that may spell `text` after `before`; the likeliest first.

        The later ones encode `text` together with some text in front that stays a token of its
        own, which makes WordPiece mark the first piece as the rest of a word.
        """
        yield self.encode(text)
        words = before.split()
        for front in (*before[-1:], *words[-1:], "a", "0", "."):
            ids, joint = self.encode(front), self.encode(front + text)
            if ids and joint[: len(ids)] == ids:
                yield joint[len(ids) :]


def clean_up(text: str) -> str:
    """Spaces before punctuation removed, as `clean_up_tokenization` of transformers does."""
    for found, put in _CLEAN_UP.items():
        text = text.replace(found, put)
    return text


def common_prefix(left: str, right: str) -> str:
    """The longest text that both start with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(pair[0] for pair in same)


def _without_start(rule: Any) -> Any:
    """A normalizer or pre-tokenizer of tokenizer.json without what it adds at the start."""
    if isinstance(rule, list):
        return [inner for inner in map(_without_start, rule) if inner is not None]
    if not isinstance(rule, dict):
        return rule
    kind = rule.get("type")
    if kind == "Prepend":
        return None
    changed = {key: _without_start(value) for key, value in rule.items()}
    if kind == "Metaspace":
        changed |= {"prepend_scheme": "never", "add_prefix_space": False}
    if kind == "ByteLevel":
        changed |= {"add_prefix_space": False}
    if kind == "Strip":
        changed |= {"strip_left": False}
    return changed
