"""`PPOBatch`: prompts as a data loader gives them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Int

from ..io.tokenizer import Tokenizer
from ..types import Prompts
from .text_reward import Columns


@dataclass(frozen=True, eq=False)
class PPOBatch:
    """Prompts as a data loader gives them, padded on either side.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 or true where there is a token.
        columns: what else belongs to the prompts, such as reference answers: name -> N values. A
            `PythonReward` gets the columns that it takes.

    Raises:
        ValueError: fractions where ids or masks belong, shapes that differ, a prompt without a
            token, or a column of another length.
    """

    input_ids: Int[ArrayLike, "N P"]
    attention_mask: Int[ArrayLike, "N P"] | Bool[ArrayLike, "N P"]
    columns: Columns = field(default_factory=dict)

    def __post_init__(self):
        tokens, mask = np.asarray(self.input_ids), np.asarray(self.attention_mask)
        if tokens.dtype.kind not in "iu":
            raise ValueError(
                f"input_ids must be whole numbers, the ids of a tokenizer; got {tokens.dtype}."
            )
        odd = mask[(mask != 0) & (mask != 1)]
        if mask.dtype.kind not in "biu" or odd.size:
            got = odd[0] if odd.size else mask.dtype
            raise ValueError(f"attention_mask must be 0 and 1, or booleans; got {got}.")
        if tokens.shape != mask.shape or tokens.ndim != 2:
            raise ValueError(
                f"input_ids {tokens.shape} and attention_mask {mask.shape} must be [N, P] alike."
            )
        some = mask.astype(bool).any(axis=1)
        if not some.all():
            row = int(np.argmin(some))
            raise ValueError(f"prompt {row} has no token: its attention_mask is all zero.")
        for name, values in self.columns.items():
            if len(values) != len(tokens):
                raise ValueError(
                    f"column {name!r} has {len(values)} values for {len(tokens)} prompts."
                )

    @classmethod
    def from_texts(
        cls,
        tokenizer: Tokenizer | None,
        texts: Sequence[str],
        *,
        width: int | None = None,
        columns: Columns | None = None,
    ) -> "PPOBatch":
        """Prompts as text, tokenized and padded.

        Args:
            tokenizer: the policy's.
            texts: N prompts.
            width: P; None takes the longest prompt's. Every width compiles a program.
            columns: as in the class.

        Returns:
            A batch of N prompts.

        Raises:
            ValueError: no tokenizer, a prompt without a token, or one longer than `width`.
        """
        if tokenizer is None:
            raise ValueError("the policy has no tokenizer, so it cannot read text; pass input_ids.")
        # The mask says which slots are used, so that any id can pad.
        prompts = Prompts.from_ids(tokenizer.encode_prompts(texts), width=width)
        return cls(prompts.tokens, prompts.mask, columns or {})

    def prompts(self) -> Prompts:
        """The same prompts left-padded, numbered by their place in the batch."""
        tokens, mask = np.asarray(self.input_ids), np.asarray(self.attention_mask).astype(bool)
        # A stable sort by the mask moves padding to the left and keeps the order of tokens.
        order = np.argsort(mask, axis=1, kind="stable")
        return Prompts(
            jnp.asarray(np.take_along_axis(tokens, order, axis=1), jnp.int32),
            jnp.asarray(np.take_along_axis(mask, order, axis=1)),
            jnp.arange(tokens.shape[0], dtype=jnp.int32),
        )

    def columns_of(self, prompts: Sequence[int]) -> dict[str, list[Any]]:
        """The columns of a rollout's sequences.

        Args:
            prompts: the prompt of each sequence, by its place in the batch.

        Returns:
            Name -> one value per sequence.
        """
        return {name: [values[i] for i in prompts] for name, values in self.columns.items()}
