"""The data of the sentiment demo: rated texts as token sequences, split by source."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from ..io.tokenizer import Tokenizer
from .human_ratings import RatedText

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
DROPPED = "<unk>"


@dataclass(frozen=True)
class SentimentData:
    """Token sequences (BOS ... EOS) and ratings, split by text."""

    tokenizer: Tokenizer
    train: list[list[int]]
    train_ratings: list[float]
    train_movies: list[list[int]]
    held_out: list[list[int]]
    held_out_ratings: np.ndarray
    held_out_domains: np.ndarray


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of lower-cased text, because the data is small."""
    backend = tokenizers.Tokenizer(BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, DROPPED, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return Tokenizer.of(backend, eos_token=EOS, pad_token=PAD, bos_token=BOS)


def prepare(
    ratings: Sequence[RatedText], vocab_size: int, rng: np.random.Generator
) -> SentimentData:
    """Split the texts nine to one and train a tokenizer of `vocab_size` ids on the larger side.

    Each distinct text, and each review or article that texts were cut from, is on one side.
    """
    unique = list({rated.text.lower(): rated for rated in ratings}.values())
    sources = sorted({rated.source for rated in unique})
    picked = rng.permutation(len(sources))[: len(sources) // 10]
    held_out_sources = {sources[i] for i in picked}
    held_out = [rated for rated in unique if rated.source in held_out_sources]
    train = [rated for rated in unique if rated.source not in held_out_sources]
    tokenizer = train_tokenizer([rated.text for rated in train], vocab_size)

    def encode(rated: Sequence[RatedText]) -> list[list[int]]:
        return [[*ids, tokenizer.id_of(EOS)] for ids in tokenizer.encode([r.text for r in rated])]

    sequences = encode(train)
    return SentimentData(
        tokenizer=tokenizer,
        train=sequences,
        train_ratings=[rated.rating for rated in train],
        train_movies=[s for s, r in zip(sequences, train, strict=True) if r.domain == "movie"],
        held_out=encode(held_out),
        held_out_ratings=np.array([rated.rating for rated in held_out]),
        held_out_domains=np.array([rated.domain for rated in held_out]),
    )


def split_prompts(
    data: SentimentData, lengths: tuple[int, int], num_held_out: int, rng: np.random.Generator
) -> tuple[list[list[int]], list[list[int]]]:
    """The first words of held-out movie snippets as prompts.

    Args:
        data: of the demo.
        lengths: the smallest and the largest number of tokens after BOS.
        num_held_out: prompts to evaluate on.
        rng: draws the lengths.

    Returns:
        (prompts to train on, prompts to evaluate on).
    """
    low, high = lengths
    movies = [data.held_out[i] for i in np.flatnonzero(data.held_out_domains == "movie")]
    # BOS and at least one token must be left to write before EOS.
    movies = [tokens for tokens in movies if len(tokens) > high + 2]
    prompts = [tokens[: 1 + rng.integers(low, high + 1)] for tokens in movies]
    return prompts[num_held_out:], prompts[:num_held_out]
