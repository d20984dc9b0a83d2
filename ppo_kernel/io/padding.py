"""Left padding of ragged token ids."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


def left_pad(
    sequences: Sequence[Sequence[int]], *, pad_id: int, width: int | None = None
) -> tuple[Int[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
    """Ragged ids -> a rectangle with the padding on the left.

    Args:
        sequences: N lists of ids, none empty.
        pad_id: what unused slots hold; any id.
        width: P; None takes the longest sequence's.

    Returns:
        (tokens, mask of the slots that hold one).

    Raises:
        ValueError: there is no sequence, an empty one, or one longer than `width`.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        where = f"sequence {lengths.index(0)} is empty" if lengths else "there are no sequences"
        raise ValueError(f"nothing to pad: {where}.")
    width = max(lengths) if width is None else width
    if max(lengths) > width:
        raise ValueError(
            f"sequence {lengths.index(max(lengths))} has {max(lengths)} tokens, more than "
            f"width={width}; truncate it or raise the width."
        )
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    tokens = np.full((len(lengths), width), pad_id, np.int32)
    tokens[mask] = np.concatenate([np.asarray(sequence, np.int32) for sequence in sequences])
    return tokens, mask
