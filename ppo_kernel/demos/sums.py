"""Two-digit sums as text: the problems, their split, their tokenizer, and the reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers.models import BPE

from ..io.tokenizer import Tokenizer

EOS = "</s>"
ALPHABET = "0123456789+="
PROMPT_WIDTH = len("99+99=")
ANSWER_WIDTH = len("198") + 1
"""Tokens of the longest answer, EOS included."""

Problem = tuple[int, int]


@dataclass(frozen=True)
class Problems:
    """Problems of SFT, of PPO and held out, disjoint; `a+b` and `b+a` are in the same set."""

    sft: list[Problem]
    ppo: list[Problem]
    held_out: list[Problem]


def make_tokenizer() -> Tokenizer:
    """One token per character, and EOS, which also pads: every other id is visible in the text."""
    vocabulary = {token: i for i, token in enumerate([EOS, *ALPHABET])}
    backend = tokenizers.Tokenizer(BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOS])
    return Tokenizer.of(backend, eos_token=EOS, pad_token=EOS)


def split_problems(
    operands: tuple[int, int], sft_share: float, held_out_share: float, rng: np.random.Generator
) -> Problems:
    """All problems, split at random; both orders of a pair of operands are in one part.

    Args:
        operands: the smallest and the largest.
        sft_share, held_out_share: of the problems; PPO gets the rest.
        rng: decides the split and the order within a part.
    """
    low, high = operands
    pairs = [(a, b) for a in range(low, high + 1) for b in range(a, high + 1)]
    bounds = np.cumsum([sft_share, held_out_share]) * len(pairs)
    parts = np.split(rng.permutation(len(pairs)), bounds.round().astype(int))

    def both_orders(part: np.ndarray) -> list[Problem]:
        chosen = sorted({p for i in part for p in (pairs[i], pairs[i][::-1])})
        return [chosen[i] for i in rng.permutation(len(chosen))]

    sft, held_out, ppo = (both_orders(part) for part in parts)
    return Problems(sft, ppo, held_out)


def question(problem: Problem) -> str:
    """The prompt of a problem, such as `37+45=`."""
    return f"{problem[0]}+{problem[1]}="


def exact(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward: 1 for the right number as Python writes it, 0 for all else; no partial credit."""

    def answer(prompt: str) -> str:
        left, right = prompt.removesuffix("=").split("+")
        return str(int(left) + int(right))

    return [
        float(response == answer(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def solved(
    problems: Sequence[Problem], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[float]]:
    """(ids of problems with their answers, number of prompt tokens, which are context only)."""
    questions = tokenizer.encode([question(problem) for problem in problems])
    answers = tokenizer.encode([str(sum(problem)) for problem in problems])
    rows = [[*q, *a, tokenizer.id_of(EOS)] for q, a in zip(questions, answers, strict=True)]
    return rows, [float(len(ids)) for ids in questions]
