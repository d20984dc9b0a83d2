"""Refusal of arrays that would be broadcast to a wrong result."""

from jaxtyping import Array, Shaped


def check_shape(name: str, x: Shaped[Array, "..."], *shapes: tuple[int, ...]) -> None:
    """Refuse an array of another shape than one of `shapes`.

    Args:
        name: what the message calls it.
        x: anything with a shape; traced or not.
        shapes: those allowed.

    Raises:
        ValueError: names the array, its shape and what it must be.
    """
    shape = getattr(x, "shape", None)
    if shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        got = f"shape {shape}" if shape is not None else repr(x)
        raise ValueError(f"{name} must be an array of shape {wanted}, got {got}.")
