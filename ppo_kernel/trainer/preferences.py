"""A reward model from pairs: of two responses to a prompt, the one that people prefer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.protocol import Critic
from .reward_model import bradley_terry_loss, score_sequences, sequence_scores
from .supervised import Batch, FitConfig, pad_right, shuffled


@dataclass(frozen=True)
class TokenPair:
    """Prompt and response as token ids, EOS included: the chosen one and the rejected one."""

    chosen: Sequence[int]
    rejected: Sequence[int]

    def __len__(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen), len(self.rejected))


def pair_batches(
    pairs: Sequence[TokenPair], config: FitConfig, rng: np.random.Generator
) -> Iterator[tuple[Batch, ...]]:
    """Endless batches of `config.batch_size` pairs, reshuffled every epoch.

    Each is split by length into as many parts as there are widths, each of the narrowest that
    holds it: a score is of a whole response. The first half of a part's rows are the chosen ones,
    the second half the rejected ones in the same order.

    Raises:
        ValueError: there are fewer pairs than `config.batch_size`.
    """
    for indices in shuffled(len(pairs), config.batch_size, rng, what="pairs"):
        rows = sorted((pairs[i] for i in indices), key=len)
        yield tuple(_batch(rows[low:high], config.widths) for low, high in config.bounds())


def _batch(pairs: Sequence[TokenPair], widths: Sequence[int]) -> Batch:
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    longest = max(map(len, pairs))
    tokens, mask = pad_right(rows, min((w for w in widths if w >= longest), default=max(widths)))
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(len(rows)))


def preference_loss(model: Critic, parts: tuple[Batch, ...]) -> Float[Array, ""]:
    """Mean Bradley-Terry loss over the pairs of a batch of `pair_batches`, nats a pair."""
    losses = []
    for part in parts:
        chosen, rejected = jnp.split(sequence_scores(model, part.tokens, part.mask), 2)
        losses.append(bradley_terry_loss(chosen, rejected))
    return jnp.mean(jnp.concatenate(losses))


def preference_accuracy(
    model: Critic, pairs: Sequence[TokenPair], *, width: int, batch_size: int
) -> float:
    """Share of pairs whose chosen response has the higher score; a tie counts half."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = score_sequences(model, rows, width=width, batch_size=batch_size)
    chosen, rejected = np.split(scores, 2)
    return float(np.mean(chosen > rejected) + 0.5 * np.mean(chosen == rejected))
