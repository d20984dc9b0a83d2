"""What an update changes: two models, Adam's memory of each, and a coefficient."""

from dataclasses import dataclass

import numpy as np

from ..models.heads import Model
from ..tree import tree_map


@dataclass(frozen=True)
class Moments:
    """Adam's memory: steps taken, running means of gradients and of their squares."""

    count: int
    first: dict
    second: dict

    @classmethod
    def zero(cls, parameters: dict) -> "Moments":
        """Before the first step."""
        return cls(0, tree_map(np.zeros_like, parameters), tree_map(np.zeros_like, parameters))


@dataclass(frozen=True)
class TrainState:
    """What an iteration changes; critic and its moments are None where there is no critic."""

    policy: Model
    critic: Model | None
    actor_moments: Moments
    critic_moments: Moments | None
    kl_coef: float
    iteration: int

    @classmethod
    def start(cls, policy: Model, critic: Model | None, kl_coef: float) -> "TrainState":
        """Before the first iteration."""
        critic_moments = None if critic is None else Moments.zero(critic.parameters)
        return cls(policy, critic, Moments.zero(policy.parameters), critic_moments, kl_coef, 0)
