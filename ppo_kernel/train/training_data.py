"""The files of a training as token ids, split and checked before any model is loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..io.text_files import Example, Preference, read_examples, read_preferences, read_prompts
from ..io.tokenizer import Tokenizer
from .encoder import Encoder
from .preferences import TokenPair
from .settings import TrainSettings
from .supervised import FitConfig

_WIDTH_STEP = 32
_MOST_HELD_OUT_PROMPTS = 64

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    """What the stages read, as token ids.

    Attributes:
        tokenizer: of the policy.
        prompts, held_out_prompts: for PPO to train on and to be judged on.
        examples: for SFT, EOS included; `num_read` of each are its prompt, which is only read.
        pairs, held_out_pairs: for the reward model to train on and to be judged on.
        sft_fit, reward_fit: settings of the stages, no wider than the data.
        digests: SHA-256 of each file.
        notes: what a person should know of the data, a line each.
    """

    tokenizer: Tokenizer
    prompts: list[list[int]]
    held_out_prompts: list[list[int]]
    examples: list[list[int]]
    num_read: list[float]
    pairs: list[TokenPair]
    held_out_pairs: list[TokenPair]
    sft_fit: FitConfig
    reward_fit: FitConfig
    digests: dict[str, str]
    notes: list[str]

    @property
    def prompt_width(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts + self.held_out_prompts))

    def summary(self) -> str:
        """What the stages train on, in a line."""
        parts = [
            f"{len(self.prompts)} prompts ({len(self.held_out_prompts)} more held out) of up to "
            f"{self.prompt_width} tokens"
        ]
        if self.examples:
            epochs = _epochs(self.sft_fit, self.examples)
            parts.append(f"SFT on {len(self.examples)} examples, {epochs}")
        if self.pairs:
            held_out, epochs = len(self.held_out_pairs), _epochs(self.reward_fit, self.pairs)
            parts.append(
                f"reward model on {len(self.pairs)} pairs ({held_out} more held out), {epochs}"
            )
        return "; ".join(parts)


def load_data(settings: TrainSettings, rng: np.random.Generator) -> TrainingData:
    """Read, encode and split the files; `rng` decides what is held out.

    Raises:
        FileNotFoundError: no model folder.
        ValueError: a mistake in a file, or too little that can be used.
    """
    files = {"prompts": settings.prompts, "sft": settings.sft, "preferences": settings.preferences}
    files = {name: path for name, path in files.items() if path is not None}
    # All files are read before any is encoded: a mistake in the last one shows at once.
    prompt_texts = read_prompts(settings.prompts)
    examples = read_examples(settings.sft) if settings.sft else []
    preferences = read_preferences(settings.preferences) if settings.preferences else []
    encoder, notes = Encoder(settings.model), []
    prompts, held_out_prompts = _prompts(prompt_texts, settings, encoder, rng, notes)
    rows, num_read = _examples(examples, settings, encoder, notes)
    pairs, held_out_pairs = _pairs(preferences, settings, encoder, rng, notes)
    return TrainingData(
        tokenizer=encoder.tokenizer,
        prompts=prompts,
        held_out_prompts=held_out_prompts,
        examples=rows,
        num_read=num_read,
        pairs=pairs,
        held_out_pairs=held_out_pairs,
        sft_fit=_no_wider(settings.sft_fit, rows),
        reward_fit=_no_wider(settings.reward_fit, pairs + held_out_pairs),
        digests={
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
        },
        notes=notes,
    )


def _prompts(
    texts: Sequence[str],
    settings: TrainSettings,
    encoder: Encoder,
    rng: np.random.Generator,
    notes: list[str],
) -> tuple[list[list[int]], list[list[int]]]:
    """(train, held out) of those that leave room for a response."""
    ppo, file = settings.ppo, settings.prompts
    longest = ppo.max_seq_len - (ppo.max_new_tokens or 1)
    prompts = [ids for ids in encoder.prompts(texts) if 0 < len(ids) <= longest]
    if len(prompts) < len(texts):
        notes.append(
            f"{file}: {len(texts) - len(prompts)} of {len(texts)} prompts are left out: they have "
            f"more than {longest} tokens (ppo.max_seq_len less ppo.max_new_tokens), or none"
        )
    train, held_out = _split(prompts, settings.held_out, rng, most=_MOST_HELD_OUT_PROMPTS)
    _check_count(
        file, "prompts", len(train), len(held_out), ppo.num_prompts, "ppo.train_batch_size"
    )
    return train, held_out


def _examples(
    examples: Sequence[Example], settings: TrainSettings, encoder: Encoder, notes: list[str]
) -> tuple[list[list[int]], list[float]]:
    """(token ids, how many of them are only read) of those with something to imitate."""
    prompts = encoder.prompts([e.prompt or "" for e in examples])
    responses = encoder.responses([e.response for e in examples])
    texts = encoder.texts([e.response for e in examples])
    width = max(settings.sft_fit.widths)
    rows, num_read, cut = [], [], 0
    for example, prompt, response, text in zip(examples, prompts, responses, texts, strict=True):
        ids, read = (text, 0) if example.prompt is None else (prompt + response, len(prompt))
        cut += len(ids) > width
        if read < width:
            rows.append(ids)
            num_read.append(float(read))
    if cut:
        notes.append(
            f"{settings.sft}: {cut} of {len(examples)} examples have more than {width} tokens "
            f"(sft_fit.widths) and are cut; {len(examples) - len(rows)} are left out, for no token "
            "of the response is left"
        )
    if examples:
        size = settings.sft_fit.batch_size
        _check_count(settings.sft, "examples", len(rows), 0, size, "sft_fit.batch_size")
    return rows, num_read


def _pairs(
    preferences: Sequence[Preference],
    settings: TrainSettings,
    encoder: Encoder,
    rng: np.random.Generator,
    notes: list[str],
) -> tuple[list[TokenPair], list[TokenPair]]:
    """(train, held out) of the pairs that fit: of a cut response nobody knows the score."""
    prompts = encoder.prompts([p.prompt for p in preferences])
    chosen = encoder.responses([p.chosen for p in preferences])
    rejected = encoder.responses([p.rejected for p in preferences])
    width, file = max(settings.reward_fit.widths), settings.preferences
    pairs = [TokenPair(p + c, p + r) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    fitting = [pair for pair in pairs if len(pair) <= width]
    if len(fitting) < len(pairs):
        notes.append(
            f"{file}: {len(pairs) - len(fitting)} of {len(pairs)} pairs are left out: they have "
            f"more than {width} tokens (reward_fit.widths)"
        )
    if not preferences:
        return [], []
    train, held_out = _split(fitting, settings.held_out, rng)
    size = settings.reward_fit.batch_size
    _check_count(file, "pairs", len(train), len(held_out), size, "reward_fit.batch_size")
    return train, held_out


def _split(
    rows: Sequence[T], share: float, rng: np.random.Generator, most: int | None = None
) -> tuple[list[T], list[T]]:
    """(train, held out): `share` of the rows, at least one and at most `most`, are held out."""
    count = min(max(1, round(share * len(rows))), len(rows) if most is None else most)
    order = rng.permutation(len(rows))
    return [rows[i] for i in np.sort(order[count:])], [rows[i] for i in np.sort(order[:count])]


def _check_count(
    file: Path | None, what: str, count: int, held_out: int, needed: int, setting: str
) -> None:
    if count < needed:
        kept = f" besides {held_out} held out" if held_out else ""
        raise ValueError(
            f"{file} has {count} {what} to train on{kept}, a batch takes {needed}; add {what} or "
            f"lower {setting}."
        )


def _no_wider(config: FitConfig, rows: Sequence[Sequence[int] | TokenPair]) -> FitConfig:
    """The settings with widths no larger than the longest row needs; a few sizes for many data."""
    longest = -(-max(map(len, rows), default=1) // _WIDTH_STEP) * _WIDTH_STEP
    return replace(config, widths=tuple(min(width, longest) for width in config.widths))


def _epochs(config: FitConfig, rows: Sequence) -> str:
    return f"{config.num_steps * config.batch_size / len(rows):.2g} times"
