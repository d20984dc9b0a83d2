"""A reward model from single rated texts: its data, loss, accuracy and the baseline to beat."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.protocol import Critic
from ..trainer.preferences import bradley_terry_loss, sequence_scores
from ..trainer.supervised import Batch


def augment(tokens: Sequence[int], rng: np.random.Generator, dropped_id: int) -> Sequence[int]:
    """A text as the reward model sees it in training: often a prefix, always with words dropped.

    PPO shows the model unfinished texts, and 20,000 texts would otherwise be learnt by heart.

    Args:
        tokens: of a text, BOS first.
        rng: decides what is cut and dropped.
        dropped_id: stands where a token is dropped.

    Returns:
        Token ids, BOS kept.
    """
    if rng.random() < 0.3 and len(tokens) > 6:
        tokens = tokens[: int(rng.integers(6, len(tokens)))]
    missing = rng.random(len(tokens)) < 0.2
    missing[0] = False
    return np.where(missing, dropped_id, tokens).tolist()


def rated_pairs_loss(
    scores: Float[Array, " B"], ratings: Float[Array, " B"], *, sharpness: float = 1.0
) -> Float[Array, ""]:
    """Bradley-Terry over every pair of a batch, with soft labels from the ratings.

        p_ij = sigmoid(sharpness (rating_i - rating_j))
        loss = 2 / (B (B - 1)) * sum over i != j of -p_ij log sigmoid(s_i - s_j)

    A batch of B rated texts gives B (B - 1) ordered pairs from B forward passes. The soft label
    keeps pairs with nearly equal ratings from counting as if the raters had been sure.

    Args:
        scores: the model's.
        ratings: human means.
        sharpness: nats of preference per unit of rating.

    Returns:
        Nats per pair.
    """
    label = jax.nn.sigmoid(sharpness * (ratings[:, None] - ratings[None, :]))
    chosen = jnp.broadcast_to(scores[:, None], label.shape)
    losses = label * bradley_terry_loss(chosen, chosen.T)
    count = scores.shape[0] * (scores.shape[0] - 1)
    # i = j adds a constant log(2) / 2, without gradient, that does not belong to the mean.
    off_diagonal = ~jnp.eye(scores.shape[0], dtype=bool)
    return jnp.sum(jnp.where(off_diagonal, losses, 0.0)) * 2.0 / max(count, 1)


def rated_texts_loss(model: Critic, parts: tuple[Batch, ...]) -> Float[Array, ""]:
    """`rated_pairs_loss` over all sequences of a batch; `targets` are the human ratings."""
    scores = [sequence_scores(model, part.tokens, part.mask) for part in parts]
    return rated_pairs_loss(jnp.concatenate(scores), jnp.concatenate([p.targets for p in parts]))


def pair_accuracy(
    scores: Float[np.ndarray, " X"], ratings: Float[np.ndarray, " X"], *, min_gap: float
) -> tuple[float, int]:
    """Share of the pairs whose ratings differ by `min_gap` or more that the scores order alike.

    A tie of scores counts half.

    Returns:
        (share in [0, 1], number of pairs); 0.5 where there is no pair.
    """
    gaps = ratings[:, None] - ratings[None, :]
    wanted = gaps >= max(min_gap, 1e-12)
    differences = (scores[:, None] - scores[None, :])[wanted]
    right = np.sum(differences > 0) + 0.5 * np.sum(differences == 0)
    return (float(right / differences.size) if differences.size else 0.5), int(differences.size)


def ridge_baseline(
    train_sequences: Sequence[Sequence[int]],
    train_ratings: Sequence[float],
    sequences: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    penalty: float = 30.0,
) -> Float[np.ndarray, " X"]:
    """Scores of a bag-of-words ridge regression: the baseline of a reward model.

        w = argmin |X w - r|^2 + penalty |w|^2

    X [texts, V] says which tokens a text has; the ratings r are centred.

    Args:
        train_sequences, train_ratings: token ids and human means to fit.
        sequences: to be scored.
        vocab_size: V, the number of features.
        penalty: of the ridge.

    Returns:
        One score per sequence.
    """

    def features(rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "X V"]:
        matrix = np.zeros((len(rows), vocab_size), np.float32)
        for row, tokens in zip(matrix, rows, strict=True):
            row[np.asarray(tokens)] = 1.0
        return matrix

    x, y = features(train_sequences), np.asarray(train_ratings, np.float32)
    gram = x.T @ x + penalty * np.eye(vocab_size, dtype=np.float32)
    weights = np.linalg.solve(gram, x.T @ (y - y.mean()))
    return features(sequences) @ weights
