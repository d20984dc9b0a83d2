"""Settings of a rotary position embedding, and the frequencies that they give."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ..ops.checks import POSITIVE, SHARE


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies.

    Source: Grattafiori et al. 2024, sec. 3.2, https://arxiv.org/abs/2407.21783.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: how they are stretched; None for not at all.
        fraction: share of a head's channels that is rotated, the first ones.

    Raises:
        ValueError: a number out of its range.
    """

    theta: float = 10_000.0
    scaling: RopeScaling | None = None
    fraction: float = 1.0

    def __post_init__(self):
        POSITIVE.check("rope theta", self.theta)
        SHARE.check("rope fraction", self.fraction)

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """theta^(-2i/R) for i in [0, R/2), stretched by `scaling`; radians per position.

        R = fraction * head_dim channels are rotated.
        """
        width = self.width(head_dim)
        exponents = np.arange(0, width, 2, dtype=np.float64) / width
        frequencies = self.theta**-exponents
        scaling = self.scaling
        if scaling is None:
            return frequencies
        turns = scaling.original_max_position * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / scaling.factor)

    def width(self, head_dim: int) -> int:
        """R, the channels of a head that are rotated."""
        return int(head_dim * self.fraction)
