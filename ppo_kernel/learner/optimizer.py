"""Stage 5b, inside: one optimizer step, and which parameters weight decay shrinks."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from ..config import OptimizerHyperparams
from ..ops.dtypes import upcast_tree
from ..types import Scalar

_NO_MATRIX = re.compile(r"bias|norm", re.IGNORECASE)


class ModelState(eqx.Module):
    """One model as it trains.

    Attributes:
        parameters: the trained leaves, None elsewhere.
        optimizer_state: moments, in at least float32.
        remainder: what rounding took from the parameters; None for float32 and wider ones.
    """

    parameters: PyTree
    optimizer_state: PyTree
    remainder: PyTree | None


def global_norm(gradient: PyTree) -> Float[Array, ""]:
    """Euclidean norm of all the numbers of a gradient; 0 where nothing is trained."""
    if not jax.tree.leaves(gradient):
        return jnp.zeros(())
    return optax.tree.norm(gradient)


def optimizer_step(
    state: ModelState,
    gradient: PyTree,
    norm: Float[Array, ""],
    applied: Bool[Array, ""],
    hyperparams: OptimizerHyperparams,
    optimizer: optax.GradientTransformation,
) -> ModelState:
    """One optimizer step of a model, or none.

        g <- g min(1, max_grad_norm / |g|),   x <- x - learning_rate * direction(g)

    Parameters narrower than float32 round off most of such steps. What they could not hold is kept
    and added to the next one: x + remainder is the parameter in float32 (Kahan's sum, as in Zamirai
    et al. 2020, https://arxiv.org/abs/2010.06192).

    Args:
        state: parameters, moments and remainder.
        gradient: of the parameters, in at least float32.
        norm: the gradient's `global_norm`.
        applied: whether the step is taken; else the state stays as it is.
        hyperparams: learning rate and bound of the gradient norm.
        optimizer: gives the direction.

    Returns:
        The state after the step.
    """
    if hyperparams.max_grad_norm is not None:
        limit = jnp.asarray(hyperparams.max_grad_norm, norm.dtype)
        scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)
    moved = _moved(state, gradient, hyperparams.learning_rate, optimizer)
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), moved, state)


def _moved(
    state: ModelState,
    gradient: PyTree,
    rate: Scalar,
    optimizer: optax.GradientTransformation,
) -> ModelState:
    """The model after x <- x - rate * direction, with new moments and remainder."""
    parameters, remainder = state.parameters, state.remainder
    exact = upcast_tree(parameters)
    if remainder is not None:
        exact = jax.tree.map(jnp.add, exact, remainder)
    # Optax mixes types on purpose; a caller's strict promotion is for our own code.
    with jax.numpy_dtype_promotion("standard"):
        direction, moments = optimizer.update(gradient, state.optimizer_state, exact)
    exact = jax.tree.map(lambda x, d: x - jnp.asarray(rate, d.dtype) * d, exact, direction)
    if remainder is not None:
        remainder = jax.tree.map(lambda x, old: x - _rounded(x, old.dtype), exact, parameters)
    moved = jax.tree.map(lambda x, old: x.astype(old.dtype), exact, parameters)
    return ModelState(moved, moments, remainder)


def _rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """`x` as `dtype` holds it."""
    # XLA may leave out a cast there and back, but never this.
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kept.nexp, kept.nmant)


def matrices(parameters: PyTree) -> PyTree[bool]:
    """True for each matrix (linear layers, embedding, output matrix), false for all else.

    The layers of a Transformer are stacked, so a norm's weights [L, D] and biases [L, out] have
    two axes as well: they are known by their names, in a model of your own too, where "bias" or
    "norm" is part of them.

    Args:
        parameters: arrays by path, as Optax passes them to a mask; None where nothing is trained.

    Returns:
        The same tree of booleans.
    """

    def is_matrix(path: tuple, x: jax.Array) -> bool:
        return x.ndim > 1 and not _NO_MATRIX.search(jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(is_matrix, parameters)
