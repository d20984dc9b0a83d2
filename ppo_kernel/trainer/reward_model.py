"""A reward model from human judgements: Bradley-Terry losses and accuracy by margin."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..models.protocol import Critic
from .supervised import Batch, padded_batches


def sequence_scores(
    model: Critic, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> Float[Array, " B"]:
    """The model's value after the last valid slot of each row, reward units."""
    slots = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(mask, slots[None], 0), axis=1)
    return jnp.take_along_axis(model(tokens, mask), last[:, None], axis=1)[:, 0]


def bradley_terry_loss(
    chosen: Float[Array, "*batch"], rejected: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """-log sigmoid(chosen - rejected) per pair.

    Sources: Bradley & Terry 1952, https://doi.org/10.2307/2334029; Ouyang et al. 2022, eq. 1,
    https://arxiv.org/abs/2203.02155.
    """
    return jax.nn.softplus(rejected - chosen)


def rated_pairs_loss(
    scores: Float[Array, " B"], ratings: Float[Array, " B"], *, sharpness: float = 1.0
) -> Float[Array, ""]:
    """Bradley-Terry over every pair of a batch, against how sure the raters are.

        p_ij = sigmoid(sharpness (rating_i - rating_j))
        loss = 2 / (B (B - 1)) * sum over i != j of -p_ij log sigmoid(s_i - s_j)

    A batch of B rated texts gives B (B - 1) ordered pairs from B forward passes; the soft label
    keeps pairs that people rate alike from counting as if they had been sure.

    Args:
        scores: the model's.
        ratings: human means.
        sharpness: nats of preference per unit of rating.

    Returns:
        Nats a pair.
    """
    label = jax.nn.sigmoid(sharpness * (ratings[:, None] - ratings[None, :]))
    chosen = jnp.broadcast_to(scores[:, None], label.shape)
    losses = label * bradley_terry_loss(chosen, chosen.T)
    count = scores.shape[0] * (scores.shape[0] - 1)
    # i = j adds a constant log(2) / 2, without gradient, that does not belong to the mean.
    off_diagonal = ~jnp.eye(scores.shape[0], dtype=bool)
    return jnp.sum(jnp.where(off_diagonal, losses, 0.0)) * 2.0 / max(count, 1)


def reward_model_loss(model: Critic, parts: tuple[Batch, ...]) -> Float[Array, ""]:
    """`rated_pairs_loss` over all sequences of a batch; `targets` are the human ratings."""
    scores = [sequence_scores(model, part.tokens, part.mask) for part in parts]
    return rated_pairs_loss(jnp.concatenate(scores), jnp.concatenate([p.targets for p in parts]))


def score_sequences(
    model: Critic, sequences: Sequence[Sequence[int]], *, width: int, batch_size: int = 256
) -> Float[np.ndarray, " X"]:
    """Evaluation of many sequences, cut at `width`."""
    scorer = eqx.filter_jit(sequence_scores)
    scores = [
        np.asarray(scorer(model, *batch)) for batch in padded_batches(sequences, width, batch_size)
    ]
    return np.concatenate(scores)[: len(sequences)]


def pair_accuracy(
    scores: Float[np.ndarray, " X"], ratings: Float[np.ndarray, " X"], *, min_gap: float
) -> tuple[float, int]:
    """Of all pairs whose ratings differ by `min_gap` or more, the share ordered as people do.

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
    """Evaluation of a bag-of-words ridge regression: what a reward model must beat.

        w = argmin |X w - r|^2 + penalty |w|^2,   X: which tokens a text has, centred ratings r

    Args:
        train_sequences, train_ratings: token ids and human means to fit.
        sequences: to be scored.
        vocab_size: V, the number of features.
        penalty: of the ridge.
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
