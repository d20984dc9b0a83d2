"""Parameters, gradients and moments: arrays in nested dicts and lists, None where there is none."""

from collections.abc import Callable
from typing import Any

import numpy as np


def tree_map(function: Callable, tree, *others) -> Any:
    """`function` of the arrays that stand at the same place in every tree."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {k: tree_map(function, v, *(other[k] for other in others)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [tree_map(function, *branches) for branches in zip(tree, *others, strict=True)]
    return function(tree, *others)


def tree_leaves(tree) -> list[np.ndarray]:
    """Every array of the tree."""
    leaves = []
    tree_map(leaves.append, tree)
    return leaves
