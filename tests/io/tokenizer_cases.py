"""Tokenizers of the kinds that people use, trained or built here, as folders on disk."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers as pre

CORPUS = [
    "the good day to you, friend! it's fine.",
    "héllo wörld 你好 don't do n't",
    "a b c d e f g  x\ny\tz",
    "Numbers 1234 5678 and (parens) <tag>",
] * 5
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
ATOMS = [
    " ", "  ", "\n", "\t", "a", "good", "day", "ness", "the", "'s", "n't", ".", "!", ",", "1",
    "é", "e\u0301", "你", "😀", "Ａ", "\u2028", "▁", "word", *SPECIAL,
    "<L>", "<R>", "<N>", "<SL>", "<X1>", "<IMG>", "<D>", "<Y>",
]  # fmt: skip
"""Pieces of text that tokenizers treat in different ways."""


@dataclass(frozen=True)
class Case:
    """A folder: the backend, what its JSON files say besides the defaults, and its class.

    Attributes:
        backend: makes tokenizer.json.
        settings: of tokenizer_config.json; None removes a default.
        config: config.json, if any.
        special: special_tokens_map.json, if any.
        frame: tokens before and after a text.
    """

    backend: Callable[[], Backend]
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    special: dict[str, Any] | None = None
    frame: tuple[str, str] = ("", "")

    def write(self, folder: Path) -> Path:
        """Its files, into an existing folder."""
        self.backend().save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"bos_token": "<s>", "eos_token": "</s>"} | self.settings
        files = {
            "tokenizer_config.json": {k: v for k, v in settings.items() if v is not None},
            "config.json": self.config,
            "special_tokens_map.json": self.special,
        }
        for name, content in files.items():
            if content is not None:
                (folder / name).write_text(json.dumps(content))
        return folder


def byte_level(single: str = "", *, prefix: bool = False, normalizer=None) -> Backend:
    """Byte-level BPE, as GPT-2 and most after it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return framed(backend, single)


def sentencepiece(scheme: str, single: str = "") -> Backend:
    """BPE with byte fallback; a space in front by Llama 2's normalizer, or by Metaspace."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*model["vocab"], *(f"<0x{i:02X}>" for i in range(256))]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Backend(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, merges,
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "llama2":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme, split=False)
    if scheme != "never":
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in SPECIAL])
    return framed(backend, single)


def unigram(scheme: str, single: str = "") -> Backend:
    """Unigram with Metaspace, as T5 and many others."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return framed(backend, single)


def wordpiece(single: str = "") -> Backend:
    """WordPiece, as BERT."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return framed(backend, single)


def framed(backend: Backend, single: str) -> Backend:
    """With BOS, EOS or both around a text."""
    if single:
        special = [(x, backend.token_to_id(x)) for x in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
    return backend


def with_added(backend: Backend) -> Backend:
    """With added tokens of every flag."""
    backend.add_tokens(
        [
            AddedToken("<L>", lstrip=True),
            AddedToken("<R>", rstrip=True),
            AddedToken("<N>", normalized=True),
            AddedToken("word", single_word=True),
        ]
    )
    backend.add_special_tokens([AddedToken("<SL>", lstrip=True, rstrip=True, special=True)])
    return backend


BOS, EOS, BOTH = "<s> $A", "$A </s>", "<s> $A </s>"
FRONT, BACK, AROUND = ("<s>", ""), ("", "</s>"), ("<s>", "</s>")
_FLAGS = {"rstrip": False, "normalized": False, "single_word": False}
CASES = {
    "byte-level": Case(byte_level),
    "byte-level-prefix-space": Case(lambda: byte_level(prefix=True)),
    "byte-level-bos": Case(lambda: byte_level(BOS), frame=FRONT),
    "byte-level-eos": Case(lambda: byte_level(EOS), frame=BACK),
    "byte-level-both": Case(lambda: byte_level(BOTH, normalizer=normalizers.NFC()), frame=AROUND),
    "split-special": Case(byte_level, {"split_special_tokens": True}),
    "add-bos-eos": Case(byte_level, {"add_bos_token": True, "add_eos_token": True}),
    "add-no-bos-eos": Case(
        lambda: byte_level(BOTH), {"add_bos_token": False, "add_eos_token": False}, frame=AROUND
    ),
    "llama2": Case(lambda: sentencepiece("llama2", BOS), frame=FRONT),
    "llama2-bare": Case(lambda: sentencepiece("llama2")),
    "llama2-class": Case(
        lambda: sentencepiece("llama2", BOS),
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_eos_token": True},
        frame=FRONT,
    ),
    "llama2-legacy": Case(
        lambda: sentencepiece("llama2", BOS),
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        frame=FRONT,
    ),
    "llama2-no-prefix-space": Case(
        lambda: sentencepiece("llama2", BOS),
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
        frame=FRONT,
    ),
    "llama3": Case(lambda: byte_level(BOS), {"tokenizer_class": "LlamaTokenizer"}, frame=FRONT),
    "metaspace-always": Case(lambda: sentencepiece("always", BOTH), frame=AROUND),
    "metaspace-first": Case(lambda: sentencepiece("first", BOS), frame=FRONT),
    "metaspace-never": Case(lambda: sentencepiece("never")),
    "unigram": Case(lambda: unigram("always", EOS), frame=BACK),
    "unigram-first": Case(lambda: unigram("first", BOS), frame=FRONT),
    "wordpiece": Case(wordpiece, {"clean_up_tokenization_spaces": True}),
    "wordpiece-both": Case(lambda: wordpiece(BOTH), frame=AROUND),
    "bpe-clean-up": Case(byte_level, {"clean_up_tokenization_spaces": True}),
    "gpt2-class": Case(
        byte_level,
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "unk_token": "</s>"},
    ),
    "qwen2-class": Case(byte_level, {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>"}),
    "gpt-neox-class": Case(lambda: byte_level(BOTH), {"tokenizer_class": "GPTNeoXTokenizerFast"}),
    "gemma-class": Case(
        lambda: sentencepiece("never", BOS), {"tokenizer_class": "GemmaTokenizer"}, frame=FRONT
    ),
    "qwen2-model": Case(byte_level, config={"model_type": "qwen2"}),
    "qwen3-model": Case(byte_level, config={"model_type": "qwen3"}),
    "qwen3-no-class": Case(byte_level, {"tokenizer_class": None}, config={"model_type": "qwen3"}),
    "llama-model": Case(byte_level, config={"model_type": "llama"}),
    "added": Case(lambda: with_added(byte_level(BOS)), frame=FRONT),
    "added-metaspace": Case(lambda: with_added(sentencepiece("first", BOS)), frame=FRONT),
    "added-llama2": Case(lambda: with_added(sentencepiece("llama2", BOS)), frame=FRONT),
    "extra": Case(
        byte_level,
        {
            "additional_special_tokens": ["<X1>"],
            "extra_special_tokens": ["<Y>"],
            "image_token": "<IMG>",
        },
    ),
    "added-decoder": Case(
        byte_level,
        {
            "added_tokens_decoder": {
                "400": {"content": "<D>", "lstrip": True, "special": False} | _FLAGS,
                "1": {"content": "<s>", "lstrip": True, "special": True} | _FLAGS,
            }
        },
    ),
    "special-map": Case(
        byte_level,
        special={
            "eos_token": {"content": "<|im_end|>", "lstrip": True} | _FLAGS,
            "additional_special_tokens": ["<Y>"],
        },
    ),
}
