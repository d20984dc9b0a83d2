"""A reward in plain Python, over decoded text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..io.tokenizer import Tokenizer
from ..types import Rollout

TextReward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, responses) as text -> one score a response; plain Python."""


@dataclass(frozen=True)
class PythonReward:
    """A reward that is plain Python: it runs between the two compiled halves.

    Attributes:
        score: (prompts, responses) -> one finite float a response.
        tokenizer: turns the rollout's ids into text; None takes the policy's.
    """

    score: TextReward
    tokenizer: Tokenizer | None = None

    def __call__(self, rollout: Rollout) -> Float[Array, " B"]:
        """Evaluation of a concrete rollout.

        Raises:
            ValueError: there is no tokenizer, or a wrong number of scores, or one not finite.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this PythonReward has no tokenizer; pass PythonReward(score, tokenizer)."
            )
        prompts = decode(self.tokenizer, rollout.prompt_tokens, rollout.prompt_mask)
        responses = decode(self.tokenizer, rollout.tokens, rollout.mask)
        scores = np.asarray(self.score(prompts, responses), np.float64)
        if scores.shape != (len(responses),):
            raise ValueError(
                f"the reward returned shape {scores.shape} for {len(responses)} responses; "
                "it must return one float for each."
            )
        if not np.isfinite(scores).all():
            index = int(np.argmin(np.isfinite(scores)))
            raise ValueError(
                f"the reward returned {scores[index]} for response {index}: {responses[index]!r}; "
                "return a finite float."
            )
        return jnp.asarray(scores, jnp.result_type(float))


def decode(tokenizer: Tokenizer, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]) -> list[str]:
    """The text of the valid tokens of each row."""
    rows, masks = np.asarray(tokens), np.asarray(mask)
    return [tokenizer.decode(row[valid]) for row, valid in zip(rows, masks, strict=True)]
