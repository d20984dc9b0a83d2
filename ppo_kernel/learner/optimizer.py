"""Stage 5b, inside: one optimizer step, and which parameters weight decay shrinks."""

import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from ..config import Hyperparams
from ..ops.dtypes import upcast_tree
from .state import Learner

_NO_MATRIX = re.compile(r"bias|norm", re.IGNORECASE)


def optimizer_step(
    models: dict[str, PyTree],
    optimizer_states: dict[str, PyTree],
    gradients: dict[str, PyTree],
    sums: dict[str, Float[Array, ""]],
    hyperparams: Hyperparams,
    learner: Learner,
) -> tuple[tuple[dict, dict], dict[str, Float[Array, ""]], Bool[Array, ""]]:
    """One optimizer step of the models that have a gradient, or none where a number is not finite.

        g <- g min(1, max_grad_norm / |g|),   x <- x - learning_rate * direction(g)

    Parameters narrower than float32 round off most of such steps. What they could not hold is kept
    and added to the next one: x + remainder is the parameter in float32 (Kahan's sum, as in Zamirai
    et al. 2020, https://arxiv.org/abs/2010.06192).

    Args:
        models: of "actor" and "critic".
        optimizer_states: of each, moments and remainder.
        gradients: of one of them, or of both.
        sums: of the minibatch, for the metrics.
        hyperparams: learning rates and bounds of the gradient norms.
        learner: the optimizers.

    Returns:
        ((models, optimizer states), sums, applied): `grad_norm_actor` and `applied_actor` (1), or
        those of the critic, are added to the sums; all are 0 where the step was left out.
    """
    norms = {side: optax.tree.norm(gradient) for side, gradient in gradients.items()}
    applied = jnp.all(jnp.stack([jnp.isfinite(x) for x in (*norms.values(), *sums.values())]))
    for side, gradient in gradients.items():
        norm, limit = norms[side], getattr(hyperparams, f"max_grad_norm_{side}")
        if limit is not None:
            scale = jnp.minimum(1.0, jnp.asarray(limit, norm.dtype) / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda g, scale=scale: g * scale.astype(g.dtype), gradient)
        optimizer = getattr(learner, f"{side}_optimizer")
        rate = getattr(hyperparams, f"learning_rate_{side}")
        old = models[side], optimizer_states[side]
        model, state = _select(applied, _moved(*old, gradient, rate, optimizer), old)
        models, optimizer_states = models | {side: model}, optimizer_states | {side: state}
    sums = sums | {f"grad_norm_{side}": norm for side, norm in norms.items()}
    sums |= {f"applied_{side}": jnp.ones_like(norm) for side, norm in norms.items()}
    sums = _select(applied, sums, jax.tree.map(jnp.zeros_like, sums))
    return (models, optimizer_states), sums, applied


def _moved(model, state, gradient, rate, optimizer):
    """The model after x <- x - rate * direction, and the optimizer's new state and remainder."""
    moments, remainder = state
    exact = (
        upcast_tree(model)
        if remainder is None
        else jax.tree.map(jnp.add, upcast_tree(model), remainder)
    )
    # Optax mixes types on purpose; a caller's strict promotion is for our own code.
    with jax.numpy_dtype_promotion("standard"):
        direction, moments = optimizer.update(gradient, moments, exact)
    exact = jax.tree.map(lambda x, d: x - jnp.asarray(rate, d.dtype) * d, exact, direction)
    if remainder is not None:
        remainder = jax.tree.map(lambda x, old: x - _rounded(x, old.dtype), exact, model)
    return jax.tree.map(lambda x, old: x.astype(old.dtype), exact, model), (moments, remainder)


def _rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """`x` as `dtype` holds it. XLA may leave out a cast there and back, but never this."""
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kept.nexp, kept.nmant)


def _select(condition: Bool[Array, ""], if_true: PyTree, if_false: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


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
