"""Checks that refuse numbers and arrays by name, where they would silently give a wrong result."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Key, Shaped

from ..types import Scalar


def check_shape(name: str, x: Shaped[Array, "..."], *shapes: tuple[int, ...]) -> None:
    """Refuse an array whose shape is none of `shapes`.

    Args:
        name: what the message calls it.
        x: anything with a shape; traced or not.
        shapes: the allowed ones.

    Raises:
        ValueError: names the array, its shape and what it must be.
    """
    shape = getattr(x, "shape", None)
    if shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        got = f"shape {shape}" if shape is not None else repr(x)
        raise ValueError(f"{name} must be an array of shape {wanted}, got {got}.")


def check_pair(name: str, what: str, x: object) -> tuple:
    """Refuse what is no pair.

    Args:
        name: what the message calls the function that returned it.
        what: the two of them, such as "(loss, metrics)".
        x: anything.

    Returns:
        `x`.

    Raises:
        ValueError: names the function and what it returned.
    """
    if not isinstance(x, tuple) or len(x) != 2:
        raise ValueError(f"{name} must return {what}, got {type(x).__name__}.")
    return x


class Range(NamedTuple):
    """The finite numbers low <= x <= high; low < x <= high where `above`.

    `remedy` ends the message for a number outside.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    remedy: str = ""

    def check(self, name: str, value: Scalar | None) -> None:
        """Refuse a number outside the range; a traced one has no value yet and passes.

        Args:
            name: what the message calls it.
            value: a number, an array of them, or None.

        Raises:
            ValueError: names the setting, the range and the value.
        """
        if isinstance(value, Tracer):
            return
        number = np.asarray(value)
        if number.dtype.kind in "bcSUO":
            raise ValueError(f"{name} must be a real number, got {value!r}.")
        number = number.astype(np.float64)
        inside = (number > self.low) if self.above else (number >= self.low)
        if not (np.isfinite(number) & inside & (number <= self.high)).all():
            low = f", {'above' if self.above else 'at least'} {self.low:g}"
            high = f", at most {self.high:g}"
            bounds = low * (self.low > -math.inf) + high * (self.high < math.inf)
            raise ValueError(f"{name} must be finite{bounds}, got {value}.{self.remedy}")


def check_whole(name: str, value: int | None, *, least: int = 1, optional: bool = False) -> None:
    """Refuse anything but a whole number of at least `least`, or None where `optional`.

    Args:
        name: what the message calls it.
        value: the number, or None.
        least: the smallest allowed number.
        optional: whether None is allowed.

    Raises:
        ValueError: names the setting and the value.
    """
    if value is None and optional:
        return
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value is None or value < least:
        none = ", or None" if optional else ""
        raise ValueError(f"{name} must be a whole number of at least {least}{none}; got {value!r}.")


def check_key(name: str, key: Key[Array, ""]) -> None:
    """Refuse what is not a typed key.

    Args:
        name: what the message calls it.
        key: to be checked.

    Raises:
        ValueError: names the argument and the remedy.
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed:
        raise ValueError(f"{name} must be a typed key such as jax.random.key(0), got {key!r}.")


POSITIVE, FRACTION, SHARE = Range(0, above=True), Range(0, 1), Range(0, 1, above=True)
TEMPERATURE = Range(0, above=True, remedy=" For greedy decoding set top_k=1.")
