"""Adam, written out."""

from dataclasses import replace

import numpy as np

from ..config import OptimizerHyperparams
from ..models.heads import Model
from ..tree import tree_leaves, tree_map
from .state import Moments

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8


def global_norm(tree) -> float:
    """Euclidean norm of all the numbers of a tree."""
    return float(np.sqrt(sum((leaf**2).sum() for leaf in tree_leaves(tree))))


def optimizer_step(
    model: Model,
    moments: Moments,
    gradient: dict,
    norm: float,
    hyperparams: OptimizerHyperparams,
) -> tuple[Model, Moments]:
    """m = .9 m + .1 g,  v = .999 v + .001 g^2,  x -= rate * m' / (sqrt(v') + 1e-8).

    m' = m / (1 - .9^n) and v' = v / (1 - .999^n) take out the start at zero (Kingma & Ba 2015,
    https://arxiv.org/abs/1412.6980).
    """
    limit, rate = hyperparams.max_grad_norm, hyperparams.learning_rate
    if limit is not None and norm > limit:
        gradient = tree_map(lambda g: g * limit / norm, gradient)
    count = moments.count + 1
    first = tree_map(lambda m, g: FIRST_DECAY * m + (1 - FIRST_DECAY) * g, moments.first, gradient)
    second = tree_map(
        lambda v, g: SECOND_DECAY * v + (1 - SECOND_DECAY) * g**2, moments.second, gradient
    )

    def move(x: np.ndarray, m: np.ndarray, v: np.ndarray) -> np.ndarray:
        mean, square = m / (1 - FIRST_DECAY**count), v / (1 - SECOND_DECAY**count)
        return x - rate * mean / (np.sqrt(square) + EPSILON)

    parameters = tree_map(move, model.parameters, first, second)
    return replace(model, parameters=parameters), Moments(count, first, second)
