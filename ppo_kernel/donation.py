"""Which arrays a program consumes, and which it only reads."""

from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jaxtyping import Array, PyTree, Shaped

from .learner.state import Learner, TrainState


class Distinct(eqx.Module):
    """A tree in which an array that stands in several places is kept once.

    XLA counts an array once for each argument that it is.

    Attributes:
        arrays: each once.
        rest: the tree without arrays.
        structure, places: the tree of the arrays, and which of them each leaf is.
    """

    arrays: tuple[Shaped[Array, "..."], ...]
    rest: PyTree
    structure: Any = eqx.field(static=True)
    places: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, tree: PyTree) -> "Distinct":
        """The arrays of `tree`, each once, and what puts them back in their places."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        distinct = {id(x): x for x in leaves}
        number = {key: place for place, key in enumerate(distinct)}
        return cls(tuple(distinct.values()), rest, structure, tuple(number[id(x)] for x in leaves))

    @property
    def tree(self) -> PyTree:
        """The tree again."""
        leaves = [self.arrays[place] for place in self.places]
        return eqx.combine(jax.tree.unflatten(self.structure, leaves), self.rest)


def check_learner(made_by: Learner, own: Learner) -> None:
    """Refuse a state that would be updated by other functions than it was made for.

    Args:
        made_by: the state's learner.
        own: the program's.

    Raises:
        ValueError: they differ; names the functions that do.
    """
    others = [name for name, value in vars(own).items() if vars(made_by)[name] != value]
    if others:
        raise ValueError(
            f"the state was made by a Learner with another {', '.join(others)}; pass the same "
            "learner to compile_iteration, or make the state by its init."
        )


def check_own(consumed: TrainState, inputs: PyTree) -> None:
    """Refuse a state that is not there any more, or that shares arrays with another argument.

    Args:
        consumed: what the program overwrites.
        inputs: its other arguments.

    Raises:
        ValueError: says which of the two it is.
    """

    def concrete(tree: PyTree) -> list[jax.Array]:
        leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
        return [x for x in leaves if not isinstance(x, Tracer)]

    own = concrete(consumed)
    if any(x.is_deleted() for x in own):
        raise ValueError(
            "this state was consumed by an earlier call; go on with the state that it returned."
        )
    if {id(x) for x in own} & {id(x) for x in concrete(inputs)}:
        raise ValueError(
            "the state is consumed, but shares arrays with another argument; pass the models that "
            "Learner.init was given as reference or reward, or copies."
        )
