"""A reward model from pairs: of two responses to a prompt, people prefer one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..models.protocol import Critic
from .supervised import Batch, FitConfig, pad_right, padded_batches, shuffled


@dataclass(frozen=True)
class TokenPair:
    """Two responses to a prompt, as token ids of prompt, response and EOS."""

    chosen: Sequence[int]
    rejected: Sequence[int]

    def __len__(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen), len(self.rejected))


def bradley_terry_loss(
    chosen: Float[Array, "*batch"], rejected: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of a preference under the Bradley-Terry model.

        loss = -log sigmoid(chosen - rejected)

    Source: Bradley & Terry 1952, https://doi.org/10.2307/2334029; Ouyang et al. 2022,
    https://arxiv.org/abs/2203.02155, equation 1.

    Args:
        chosen, rejected: scores, reward units.

    Returns:
        Nats per pair.
    """
    return jax.nn.softplus(rejected - chosen)


def sequence_scores(
    model: Critic, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> Float[Array, " B"]:
    """The model's value after the last valid slot of each row, reward units."""
    slots = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(mask, slots[None], 0), axis=1)
    return jnp.take_along_axis(model(tokens, mask), last[:, None], axis=1)[:, 0]


def score_sequences(
    model: Critic, sequences: Sequence[Sequence[int]], *, width: int, batch_size: int = 256
) -> Float[np.ndarray, " X"]:
    """`sequence_scores` of many sequences, cut at `width`, in batches of one shape."""
    scorer = eqx.filter_jit(sequence_scores)
    scores = [
        np.asarray(scorer(model, *batch)) for batch in padded_batches(sequences, width, batch_size)
    ]
    return np.concatenate(scores)[: len(sequences)]


def pair_batches(
    pairs: Sequence[TokenPair], config: FitConfig, rng: np.random.Generator
) -> Iterator[tuple[Batch, ...]]:
    """Endless batches of `config.batch_size` pairs, reshuffled every epoch.

    A batch is sorted by length and split into as many parts as there are widths. Each part takes
    the narrowest width that holds it, because a score is of a whole response. The first half of a
    part's rows are the chosen responses, the second half the rejected ones in the same order.

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
    """Mean `bradley_terry_loss` over the pairs of a batch of `pair_batches`, nats per pair."""
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
