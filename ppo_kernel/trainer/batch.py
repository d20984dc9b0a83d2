"""`PPOBatch`: prompts as a data loader gives them."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Int

from ..types import Prompts


class PPOBatch(eqx.Module):
    """Prompts as a data loader gives them, padded on either side.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 or true where there is a token.
    """

    input_ids: Int[ArrayLike, "N P"]
    attention_mask: Int[ArrayLike, "N P"] | Bool[ArrayLike, "N P"]

    def prompts(self) -> Prompts:
        """The same prompts left-padded, numbered by their place in the batch.

        Raises:
            ValueError: the shapes differ, or a prompt has no token.
        """
        tokens, mask = np.asarray(self.input_ids), np.asarray(self.attention_mask).astype(bool)
        if tokens.shape != mask.shape or tokens.ndim != 2:
            raise ValueError(
                f"input_ids {tokens.shape} and attention_mask {mask.shape} must be [N, P] alike."
            )
        if not mask.any(axis=1).all():
            row = int(np.argmin(mask.any(axis=1)))
            raise ValueError(f"prompt {row} has no token: its attention_mask is all zero.")
        # A stable sort by the mask moves padding to the left and keeps the order of tokens.
        order = np.argsort(mask, axis=1, kind="stable")
        return Prompts(
            jnp.asarray(np.take_along_axis(tokens, order, axis=1), jnp.int32),
            jnp.asarray(np.take_along_axis(mask, order, axis=1)),
            jnp.arange(tokens.shape[0], dtype=jnp.int32),
        )
