"""A tokenizer from a model folder, without transformers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any, SupportsIndex

import tokenizers

from .continuation import Continuations, Frame, clean_up, common_prefix
from .folders import existing_folder, read_json, write_json
from .tokenizer_files import SETTINGS, SPECIAL, TokenizerFiles, effective

_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text <-> token ids, as `transformers.AutoTokenizer` of the same folder.

    Two are equal if an id means the same to both and they cut texts alike; what they put around
    a text (BOS) may differ, and how their files are written.

    Attributes:
        backend: of the `tokenizers` library; its padding and truncation are switched off.
        settings: tokenizer_config.json.
        files: other files of the folder that `save` writes again, name -> text.
        named: special tokens by name, such as "eos_token".
    """

    backend: tokenizers.Tokenizer
    settings: dict[str, Any]
    files: dict[str, str]
    named: dict[str, str]

    def __post_init__(self):
        self.backend.no_padding()
        self.backend.no_truncation()

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """The tokenizer of a folder; see `tokenizer_files.effective`.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: it has no tokenizer.json, a damaged one, or a setting that makes
                transformers read it by rules that are not known here.
        """
        folder = existing_folder(path)
        read = TokenizerFiles.read(folder)
        made = effective(read)
        kept = (folder / name for name in (SPECIAL, _TEMPLATE))
        files = {p.name: p.read_text(encoding="utf-8") for p in kept if p.is_file()}
        return cls(made.backend, read.settings, files, made.named)

    @classmethod
    def of(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        pad_token: str | None = None,
        bos_token: str | None = None,
    ) -> "Tokenizer":
        """A tokenizer of your own; the tokens that are named become special ones.

        Raises:
            ValueError: a special token is not in its vocabulary.
        """
        tokens = {"eos_token": eos_token, "pad_token": pad_token, "bos_token": bos_token}
        tokens = {name: token for name, token in tokens.items() if token is not None}
        for name, token in tokens.items():
            if backend.token_to_id(token) is None:
                raise ValueError(f"{name}={token!r} is not in the vocabulary; add it first.")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
        made = effective(TokenizerFiles(json.loads(backend.to_str()), settings))
        return cls(made.backend, settings, {}, made.named)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text, as transformers gives them.

        Args:
            texts: a list, not one string.
            add_special_tokens: put BOS, EOS, or what the tokenizer's own rules add, around each
                text.

        Raises:
            ValueError: `texts` is one string.
        """
        _check_list(texts)
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that a response is to follow.

        Those of `encode`, less what the tokenizer's rules put behind a text (EOS); what they put
        in front (BOS) stands once, though the text may spell it out as chat templates do.

        Raises:
            ValueError: `texts` is one string.
        """
        _check_list(texts)
        rows = self.encode(texts, add_special_tokens=False)
        front = self.frame.front
        return [ids if ids[: len(front)] == front else front + ids for ids in rows]

    def encode_responses(
        self, responses: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Ids of responses, each as it continues its prompt.

            ids(prompt) + ids(response) spell prompt + response

        Where the ids of the joint text start with those of the prompt, the rest is taken, as
        transformers would. Else the response is encoded as the middle of a text: without the
        space that some tokenizers put in front of one. In a vocabulary of words it starts a word.

        Args:
            responses: text, with its first space if it has one.
            prompts: as many, those of `encode_prompts`; None where nothing is known of them.

        Raises:
            ValueError: no ids spell a response after its prompt; one string instead of a list.
        """
        _check_list(responses)
        if prompts is None:
            return [self._continuations.encode(response) for response in responses]
        heads, joint = (
            self.encode_prompts(texts)
            for texts in (prompts, [p + r for p, r in zip(prompts, responses, strict=True)])
        )
        rows = zip(prompts, responses, heads, joint, strict=True)
        return [self._continue(*row) for row in rows]

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = True) -> str:
        """The text of some ids, special tokens left out by default."""
        text = self._spell([index(i) for i in ids], skip_special_tokens)
        return clean_up(text) if self._cleans_up else text

    def decode_response(
        self,
        prompt: Iterable[SupportsIndex],
        ids: Iterable[SupportsIndex],
        *,
        skip_special_tokens: bool = True,
    ) -> str:
        """The text that some ids add to that of a prompt, its first space included.

        decode(prompt + ids) = decode(prompt) + decode_response(prompt, ids)
        """
        before = [index(i) for i in prompt]
        whole = [*before, *(index(i) for i in ids)]
        head, text = (
            self.decode(x, skip_special_tokens=skip_special_tokens) for x in (before, whole)
        )
        if text.startswith(head):
            return text[len(head) :]
        # Clean-up joined the two, or the prompt ends within a character.
        head, text = (self._spell(x, skip_special_tokens) for x in (before, whole))
        text = text[len(common_prefix(head, text)) :]
        return clean_up(text) if self._cleans_up else text

    def decode_prompt(
        self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = True
    ) -> str:
        """The text that `encode_prompts` was given.

        What the tokenizer itself put in front (BOS) is left out. Where a prompt has other special
        tokens, as from a chat template, BOS is taken for one of them.
        """
        ids = [index(i) for i in ids]
        front = self.frame.front
        rest = ids[len(front) :] if ids[: len(front)] == front else ids
        special = {
            i for i, token in self.backend.get_added_tokens_decoder().items() if token.special
        }
        kept = ids if special.intersection(rest) else rest
        return self.decode(kept, skip_special_tokens=skip_special_tokens)

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
        return 1 + max(self._ids, default=-1)

    def ids_without_text(self, size: int) -> tuple[int, ...]:
        """Which of the ids below `size` stand for no text: rows that pad an embedding."""
        return tuple(sorted(set(range(size)) - self._ids))

    @cached_property
    def frame(self) -> Frame:
        """What the tokenizer's rules put around a text."""
        return Frame.of(self.backend)

    def save(self, path) -> None:
        """Write it into the existing folder `path`, for us and for transformers' AutoTokenizer.

        Raises:
            ValueError: transformers would read it by other rules, those of the class that belongs
                to `model_type` in the folder's config.json.
        """
        folder = existing_folder(path)
        self.backend.save(str(folder / "tokenizer.json"))
        write_json(folder / SETTINGS, self.settings)
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        if Tokenizer.load(folder) != self:
            kind = read_json(folder / "config.json", {}).get("model_type")
            raise ValueError(
                f"transformers reads a tokenizer in a folder of model_type {kind!r} by rules of "
                "another class; save this one with a model of another family, such as 'llama'."
            )

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

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def _continuations(self) -> Continuations:
        return Continuations(self.backend)

    @property
    def _cleans_up(self) -> bool:
        """transformers does it on request, and for BPE only on a louder one."""
        force = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        wanted = self.settings.get("clean_up_tokenization_spaces", False)
        is_bpe = isinstance(self.backend.model, tokenizers.models.BPE)
        return bool(wanted and (not is_bpe or self.settings.get(force, False)))

    def _spell(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _continue(self, prompt: str, response: str, head: list[int], joint: list[int]) -> list[int]:
        if isinstance(self.backend.model, tokenizers.models.WordLevel):
            # It has no parts of words: "one" + "two" are two of them, "onetwo" is unknown.
            return self._continuations.encode(response)
        if joint[: len(head)] == head:
            return joint[len(head) :]
        told = (self._spell(joint, False), self._spell(head, False) + response)
        for ids in self._continuations.candidates(prompt, response):
            if self._spell(head + ids, False) in told:
                return ids
        raise ValueError(
            f"the tokenizer cannot spell the response {response[:80]!r} right after the prompt "
            f"{prompt[-80:]!r}: it joins the end of one to the start of the other. End the prompt, "
            "or start the response, with a space or a new line."
        )

    def _special_id(self, name: str) -> int | None:
        token = self.named.get(name)
        return None if token is None else self.backend.token_to_id(token)


def _check_list(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"expected a list of texts, got one string: [{texts!r}] is meant?")
