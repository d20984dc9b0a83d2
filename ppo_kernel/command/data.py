"""The data files of a run as token ids, split and checked before any model is loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from ..io.folders import existing_folder
from ..io.manifest import Manifest
from ..io.text_files import Example, Preference, read_examples, read_preferences, read_prompts
from ..io.tokenizer import Tokenizer
from ..trainer.preferences import TokenPair
from ..trainer.supervised import FitConfig
from .settings import TrainSettings

_WIDTH_STEP = 32
_MOST_HELD_OUT = {"prompts": 64, "examples": 512, "pairs": 2048}
"""Upper bounds; more rows would take time and hardly sharpen the figures."""

T = TypeVar("T")


class Encoder:
    """Text -> token ids of one policy: prompts, whole texts, responses.

    Args:
        folder: of the policy.

    Raises:
        FileNotFoundError: no such folder, or it has no config.json.
        ValueError: it has no tokenizer, or nothing says what ends a text.
    """

    def __init__(self, folder: Path):
        manifest = Manifest.read(existing_folder(folder))
        self.tokenizer = Tokenizer.load(folder)
        manifest.check(self.tokenizer)
        ids, own = manifest.eos_token_ids(self.tokenizer), self.tokenizer.eos_id
        if not ids:
            raise ValueError(
                f"{folder} does not say which token ends a text; add eos_token_id to its "
                "config.json."
            )
        self.eos_id = ids[0] if own is None else own

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts: `Tokenizer.encode_prompts`."""
        return self.tokenizer.encode_prompts(texts)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts: as prompts, with EOS."""
        return [self._ended(ids) for ids in self.prompts(texts)]

    def responses(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Ids of responses to `prompts`, with EOS: `Tokenizer.encode_responses`."""
        return [self._ended(ids) for ids in self.tokenizer.encode_responses(texts, prompts)]

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` with EOS, unless the text spells it out."""
        return ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id]


@dataclass(frozen=True)
class TokenExample:
    """Token ids of a prompt, its response and EOS; the first `num_read` are context only."""

    ids: list[int]
    num_read: int

    def __len__(self) -> int:
        """All tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Split(Generic[T]):
    """Rows to train on and rows to evaluate on; both empty where there is no file."""

    train: list[T]
    held_out: list[T]

    def describe(self, what: str) -> str:
        """How many there are."""
        return f"{len(self.train)} {what} ({len(self.held_out)} more held out)"


@dataclass(frozen=True)
class TrainingData:
    """Token ids for all stages.

    Attributes:
        tokenizer: of the policy.
        prompts: of PPO.
        examples: of SFT.
        pairs: of the reward model.
        sft_fit, reward_fit: settings of the stages, no wider than the data.
        digests: SHA-256 of each file.
        notes: one line for each file with rows that were left out or cut.
    """

    tokenizer: Tokenizer
    prompts: Split[list[int]]
    examples: Split[TokenExample]
    pairs: Split[TokenPair]
    sft_fit: FitConfig
    reward_fit: FitConfig
    digests: dict[str, str]
    notes: list[str]

    @property
    def prompt_width(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts.train + self.prompts.held_out))

    def summary(self) -> str:
        """One line: rows of each stage, and how often each row is seen."""
        parts = [f"{self.prompts.describe('prompts')} of up to {self.prompt_width} tokens"]
        for stage, what, split, config in (
            ("SFT", "examples", self.examples, self.sft_fit),
            ("reward model", "pairs", self.pairs, self.reward_fit),
        ):
            if split.train:
                epochs = config.num_steps * config.batch_size / len(split.train)
                parts.append(f"{stage} on {split.describe(what)}, {epochs:.2g} times")
        return "; ".join(parts)


def load_data(settings: TrainSettings, rng: np.random.Generator) -> TrainingData:
    """Read, encode and split the files; `rng` decides what is held out.

    Raises:
        FileNotFoundError: no model folder.
        ValueError: a mistake in a file, or too little that can be used.
    """
    # All files are read before any is encoded: a mistake in the last one shows at once.
    prompts = read_prompts(settings.prompts)
    examples = read_examples(settings.sft) if settings.sft else []
    preferences = read_preferences(settings.preferences) if settings.preferences else []
    encoder = Encoder(settings.model)
    prompt_rows, prompt_note = _prompts(prompts, settings, encoder)
    example_rows, example_note = _examples(examples, settings, encoder)
    pairs, pair_note = _pairs(preferences, settings, encoder)

    def split(name: str, file: Path | None, rows: list[T], size: int, setting: str) -> Split[T]:
        if file is None:
            return Split([], [])
        made = _split(rows, settings.held_out, _MOST_HELD_OUT[name], rng)
        if len(made.train) < size:
            raise ValueError(
                f"{file} has {made.describe(name)} to train on, a batch takes {size}; add {name} "
                f"or lower {setting}."
            )
        return made

    sft_fit, reward_fit, ppo = settings.sft_fit, settings.reward_fit, settings.ppo
    return TrainingData(
        tokenizer=encoder.tokenizer,
        prompts=split(
            "prompts", settings.prompts, prompt_rows, ppo.num_prompts, "ppo.train_batch_size"
        ),
        examples=split(
            "examples", settings.sft, example_rows, sft_fit.batch_size, "sft_fit.batch_size"
        ),
        pairs=split(
            "pairs", settings.preferences, pairs, reward_fit.batch_size, "reward_fit.batch_size"
        ),
        sft_fit=_no_wider(sft_fit, example_rows),
        reward_fit=_no_wider(reward_fit, pairs),
        digests=_digests(settings),
        notes=[note for note in (prompt_note, example_note, pair_note) if note],
    )


def _prompts(
    texts: Sequence[str], settings: TrainSettings, encoder: Encoder
) -> tuple[list[list[int]], str]:
    """The prompts that leave slots for a response, and a note on the others."""
    longest = settings.ppo.max_seq_len - (settings.ppo.max_new_tokens or 1)
    rows = [ids for ids in encoder.prompts(texts) if 0 < len(ids) <= longest]
    note = (
        f"{settings.prompts}: {len(texts) - len(rows)} of {len(texts)} prompts are left out: they "
        f"have more than {longest} tokens (ppo.max_seq_len less ppo.max_new_tokens), or none"
    )
    return rows, note if len(rows) < len(texts) else ""


def _examples(
    examples: Sequence[Example], settings: TrainSettings, encoder: Encoder
) -> tuple[list[TokenExample], str]:
    """The examples with a response token left after the cut, and a note on what is cut."""
    asked = [example.prompt or "" for example in examples]
    prompts = encoder.prompts(asked)
    responses = encoder.responses([example.response for example in examples], asked)
    texts = encoder.texts([example.response for example in examples])
    encoded = [
        TokenExample(text, 0) if x.prompt is None else TokenExample(prompt + response, len(prompt))
        for x, prompt, response, text in zip(examples, prompts, responses, texts, strict=True)
    ]
    width = max(settings.sft_fit.widths)
    rows = [example for example in encoded if example.num_read < width]
    cut = sum(len(example) > width for example in encoded)
    note = (
        f"{settings.sft}: {cut} of {len(examples)} examples have more than {width} tokens "
        f"(sft_fit.widths) and are cut; {len(examples) - len(rows)} of them are left out, for "
        "nothing of the response is left"
    )
    return rows, note if cut else ""


def _pairs(
    preferences: Sequence[Preference], settings: TrainSettings, encoder: Encoder
) -> tuple[list[TokenPair], str]:
    """The pairs that fit, because a preference is of whole responses; and a note on the others."""
    asked = [pair.prompt for pair in preferences]
    prompts = encoder.prompts(asked)
    chosen = encoder.responses([pair.chosen for pair in preferences], asked)
    rejected = encoder.responses([pair.rejected for pair in preferences], asked)
    pairs = [TokenPair(p + c, p + r) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    width = max(settings.reward_fit.widths)
    rows = [pair for pair in pairs if len(pair) <= width]
    note = (
        f"{settings.preferences}: {len(pairs) - len(rows)} of {len(pairs)} pairs are left out: "
        f"they have more than {width} tokens (reward_fit.widths)"
    )
    return rows, note if len(rows) < len(pairs) else ""


def _split(rows: Sequence[T], share: float, most: int, rng: np.random.Generator) -> Split[T]:
    """Hold out `share` of the rows, at least one and at most `most`."""
    count = min(max(1, round(share * len(rows))), most)
    order = rng.permutation(len(rows))
    return Split([rows[i] for i in order[count:]], [rows[i] for i in order[:count]])


def _no_wider(config: FitConfig, rows: Sequence[TokenExample] | Sequence[TokenPair]) -> FitConfig:
    """The settings with widths no larger than the longest row, rounded up to few sizes."""
    longest = -(-max(map(len, rows), default=1) // _WIDTH_STEP) * _WIDTH_STEP
    return replace(config, widths=tuple(min(width, longest) for width in config.widths))


def _digests(settings: TrainSettings) -> dict[str, str]:
    files = {"prompts": settings.prompts, "sft": settings.sft, "preferences": settings.preferences}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path
    }
