"""What every driver shares: settings, prompts, and the lines it exchanges with `compare`.

A driver makes itself ready and warms up, then waits: each line it reads starts one round, and
each round answers with one line of JSON. So the peers run in turns, never at the same time.
"""

import argparse
import json
import resource
import sys

import numpy as np

from bench.sizes import Size, parse_size

PAD, EOS = 0, 1
"""Ids that no prompt holds."""

GAMMA, LAM, CLIP, KL, LEARNING_RATE = 1.0, 0.95, 0.2, 0.1, 1e-5
MARK = "BENCH "
"""Starts a line of the protocol; whatever else a library prints is passed over."""


def flags(*more: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags of every driver, and those of `more`; `size` is what `shape` means."""
    parser = argparse.ArgumentParser(parents=more)
    parser.add_argument("--shape", default="TINY")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    parsed.size = parse_size(parsed.shape)
    return parsed


def prompt_ids(size: Size, batches: int) -> np.ndarray:
    """Random ids of full-length prompts, the same for every peer: [batches, B, P]."""
    shape = (batches, size.batch, size.prompt)
    return np.random.default_rng(0).integers(2, size.vocab, shape, dtype=np.int32)


def make_tokenizer(size: Size):
    """Words `w2 w3 ...` to ids and back, as a fast tokenizer of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, size.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def to_text(ids: np.ndarray) -> list[str]:
    """Rows of ids in the words of `make_tokenizer`."""
    return [" ".join(f"w{token}" for token in row) for row in ids]


def emit(event: str, **facts) -> None:
    """One line to `compare`."""
    print(MARK + json.dumps({"event": event, **facts}), flush=True)


class Rounds:
    """The rounds of one driver: the first `warmup` by themselves, each later one when told to."""

    def __init__(self, warmup: int):
        self.warmup, self.done = warmup, 0

    def begin(self) -> None:
        """Wait for the turn; ends the process where `compare` has gone."""
        if self.done >= self.warmup and not sys.stdin.readline():
            raise SystemExit(0)

    def end(self, **seconds: float) -> None:
        """Report a finished round: the whole step and its parts."""
        event = "warmup" if self.done < self.warmup else "round"
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.done += 1
        emit(event, peak_mb=round(kilobytes * 1024 / 1e6), **seconds)
