"""Tokenizer classes of transformers that put rules of their own in place of tokenizer.json's.

Such a class keeps the vocabulary, the merges and the post-processor of the file. Each entry of
`CLASSES` follows the `__init__` of its namesake, as in
https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/tokenization_llama.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)

Json = dict[str, Any]

GENERIC = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast")
"""Classes that leave tokenizer.json as it is."""


@runtime_checkable
class Rules(Protocol):
    """Puts the rules of a class into a tokenizer."""

    def __call__(self, backend: Tokenizer, *, settings: Json) -> None:
        """Args: the tokenizer to change; tokenizer_config.json."""
        ...


@runtime_checkable
class Finish(Protocol):
    """What a class does once all tokens are added."""

    def __call__(self, backend: Tokenizer, *, special: Sequence[str]) -> None:
        """Args: the tokenizer to change; the special tokens, the named ones first."""
        ...


@dataclass(frozen=True)
class TokenizerClass:
    """A class that rebuilds its tokenizer from the vocabulary.

    Attributes:
        kind: of the model in tokenizer.json.
        model: settings of that model, in place of the file's.
        special: special tokens that it has without being told.
        rules: normalizer, pre-tokenizer and decoder.
        finish: what it does once all tokens are added.
    """

    kind: str
    model: Json
    special: dict[str, str]
    rules: Rules
    finish: Finish


_BPE = {"dropout": None, "unk_token": None, "ignore_merges": False, "byte_fallback": False}
_GPT2_BPE = _BPE | {
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
}
_SPM_BPE = _BPE | {
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _llama(backend: Tokenizer, *, settings: Json) -> None:
    told = settings.get("add_prefix_space")
    prefix = True if told is None else bool(told)
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme, split=False
    )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _gemma(backend: Tokenizer, *, settings: Json) -> None:
    del settings
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _gpt2(backend: Tokenizer, *, settings: Json) -> None:
    prefix = bool(settings.get("add_prefix_space", False))
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()


def _gpt_neox(backend: Tokenizer, *, settings: Json) -> None:
    _gpt2(backend, settings=settings)
    backend.normalizer = normalizers.NFC()


def _qwen2(backend: Tokenizer, *, settings: Json) -> None:
    prefix = bool(settings.get("add_prefix_space"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _as_the_file_says(backend: Tokenizer, *, special: Sequence[str]) -> None:
    del backend, special


def _special_again(backend: Tokenizer, *, special: Sequence[str]) -> None:
    # Qwen2Tokenizer adds them once more, so that flags which the folder gives them are lost.
    backend.add_tokens([AddedToken(token, special=True) for token in special])


def _no_post_processor(backend: Tokenizer, *, special: Sequence[str]) -> None:
    del special
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])


def _special_tokens(unk: str, bos: str | None, eos: str, pad: str | None) -> dict[str, str]:
    tokens = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": pad}
    return {name: token for name, token in tokens.items() if token is not None}


_END = "<|endoftext|>"

CLASSES = {
    "LlamaTokenizer": TokenizerClass(
        "BPE", _SPM_BPE, _special_tokens("<unk>", "<s>", "</s>", None), _llama, _as_the_file_says
    ),
    "GemmaTokenizer": TokenizerClass(
        "BPE",
        _SPM_BPE | {"unk_token": "<unk>"},
        _special_tokens("<unk>", "<bos>", "<eos>", "<pad>") | {"mask_token": "<mask>"},
        _gemma,
        _as_the_file_says,
    ),
    "GPT2Tokenizer": TokenizerClass(
        "BPE", _GPT2_BPE, _special_tokens(_END, _END, _END, None), _gpt2, _as_the_file_says
    ),
    "GPTNeoXTokenizer": TokenizerClass(
        "BPE",
        _GPT2_BPE,
        _special_tokens(_END, _END, _END, "<|padding|>"),
        _gpt_neox,
        _no_post_processor,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        "BPE", _GPT2_BPE, _special_tokens(_END, None, _END, _END), _qwen2, _special_again
    ),
}
"""Name without "Fast" -> the class."""

OF_MODEL = {
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "olmo": "GPTNeoXTokenizer",
    "olmo2": "TokenizersBackend",
    "olmo3": "TokenizersBackend",
    "phi": "GPT2Tokenizer",
    "phi3": "TokenizersBackend",
    "granite": "TokenizersBackend",
    "stablelm": "TokenizersBackend",
    "starcoder2": "GPT2Tokenizer",
    "mistral": "TokenizersBackend",
    "mixtral": "TokenizersBackend",
}
"""model_type in config.json -> the class that transformers registers for it."""

DISTRUSTED = ("qwen2", "phi3")
"""model_types whose registered class counts more than the one that the folder names."""
