"""A reward in plain Python, over decoded text."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..io.tokenizer import Tokenizer
from ..types import Rollout

TextReward: TypeAlias = Callable[..., Any]
"""(prompts, responses, **columns) -> scores, or (scores, metrics); plain Python.

`prompts` and `responses` are B texts, each column B values. A score is a finite float per response.
Metrics are floats by name, or B floats by name, whose mean is reported.
"""

Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Name -> one value per row; any Python objects."""


class Scored(NamedTuple):
    """Scores of a rollout, one per response, and the reward's own metrics."""

    scores: Float[Array, " B"]
    metrics: dict[str, Float[Array, " B"]]


@dataclass(frozen=True)
class PythonReward:
    """A reward in plain Python: it runs between the two compiled halves of an iteration.

    Attributes:
        score: see `TextReward`. It gets those columns of the batch that its parameters name, all
            of them where it takes `**columns`.
        tokenizer: turns the rollout's ids into text; None takes the policy's.
        skip_special_tokens: leaves the marks of a chat template out of the texts.
    """

    score: TextReward
    tokenizer: Tokenizer | None = None
    skip_special_tokens: bool = False

    def __call__(self, rollout: Rollout) -> Float[Array, " B"]:
        """Scores of a concrete rollout. Raises as `scored` does."""
        return self.scored(rollout).scores

    def scored(self, rollout: Rollout, columns: Columns | None = None) -> Scored:
        """Scores and metrics of a concrete rollout.

        Args:
            rollout: of a policy with this tokenizer.
            columns: one value per sequence.

        Returns:
            Scores and metrics, one number per response.

        Raises:
            ValueError: no tokenizer, a column that is not there, or a wrong number of scores, or
                one that is not a finite float.
        """
        # Inside a traced program this fails first, and the program's remedy is the right one: a
        # tokenizer would not help.
        np.asarray(rollout.mask)
        if self.tokenizer is None:
            raise ValueError(
                "this PythonReward has no tokenizer; pass PythonReward(score, tokenizer)."
            )
        prompts, responses = rollout_texts(
            self.tokenizer, rollout, skip_special_tokens=self.skip_special_tokens
        )
        returned = self.score(prompts, responses, **_wanted(self.score, columns or {}))
        scores, metrics = _apart(returned)
        rows = {name: _metric(name, value, responses) for name, value in metrics.items()}
        return Scored(_floats("the reward returned", scores, responses), rows)


class RolloutTexts(NamedTuple):
    """B prompts and B responses as text."""

    prompts: list[str]
    responses: list[str]


def rollout_texts(
    tokenizer: Tokenizer, rollout: Rollout, *, skip_special_tokens: bool
) -> RolloutTexts:
    """The texts of a concrete rollout.

    A prompt is what the tokenizer was given (`Tokenizer.decode_prompt`), a response what it adds to
    its prompt (`Tokenizer.decode_response`), without the EOS that ended it.

    Args:
        tokenizer: of the policy.
        rollout: B sequences.
        skip_special_tokens: leave them out.

    Returns:
        Prompts and responses.
    """
    prompts = _rows(rollout.prompt_tokens, rollout.prompt_mask)
    responses = _rows(rollout.tokens, rollout.mask)
    ended = np.asarray(rollout.terminated)
    skip = {"skip_special_tokens": skip_special_tokens}
    return RolloutTexts(
        [tokenizer.decode_prompt(prompt, **skip) for prompt in prompts],
        [
            tokenizer.decode_response(prompt, response[:-1] if eos else response, **skip)
            for prompt, response, eos in zip(prompts, responses, ended, strict=True)
        ],
    )


def _rows(tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]) -> list[list[int]]:
    """The valid ids of each row."""
    rows, masks = np.asarray(tokens), np.asarray(mask)
    return [row[valid].tolist() for row, valid in zip(rows, masks, strict=True)]


def _wanted(score: TextReward, columns: Columns) -> Columns:
    """The columns that `score` has parameters for, besides prompts and responses."""
    try:
        parameters = inspect.signature(score).parameters.values()
    except ValueError:  # some functions written in C have no signature
        return {}
    if any(x.kind is x.VAR_KEYWORD for x in parameters):
        return columns
    named = [x for x in list(parameters)[2:] if x.kind in (x.KEYWORD_ONLY, x.POSITIONAL_OR_KEYWORD)]
    missing = [x.name for x in named if x.default is x.empty and x.name not in columns]
    if missing:
        have = ", ".join(columns) or "none"
        raise ValueError(
            f"the reward takes the column {missing[0]!r}, the batch has {have}; pass "
            f"PPOBatch(..., columns={{{missing[0]!r}: [...]}})."
        )
    return {x.name: columns[x.name] for x in named if x.name in columns}


def _apart(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """(scores, metrics) of what a reward returned."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned
    return returned, {}


def _floats(what: str, values: Any, responses: Sequence[str]) -> Float[Array, " B"]:
    """One finite float per response. Raises ValueError, beginning with `what`."""
    try:
        rows = None if isinstance(values, str | Mapping) else list(values)
    except TypeError:
        rows = None
    if rows is None:
        raise ValueError(f"{what} {values!r}; return a list of floats, one for each response.")
    if len(rows) != len(responses):
        raise ValueError(
            f"{what} {len(rows)} values for {len(responses)} responses; return one float for each."
        )
    for index, (value, response) in enumerate(zip(rows, responses, strict=True)):
        if not _is_finite(value):
            raise ValueError(
                f"{what} {value!r} for response {index}: {response!r}; return a finite float."
            )
    return jnp.asarray([float(value) for value in rows], jnp.result_type(float))


def _metric(name: str, value: Any, responses: Sequence[str]) -> Float[Array, " B"]:
    values = [value] * len(responses) if _is_finite(value) else value
    return _floats(f"metric {name!r} of the reward is", values, responses)


def _is_finite(value: Any) -> bool:
    """Whether it is one finite number, of Python, NumPy, JAX or PyTorch; text is none."""
    if value is None or isinstance(value, str | bytes):
        return False
    try:
        return np.shape(value) == () and math.isfinite(value)
    except (TypeError, ValueError):
        return False
