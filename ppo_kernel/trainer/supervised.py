"""One training loop for the two supervised stages, and the batches it takes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..learner.optimizer import matrices
from ..ops.checks import FRACTION, Range, check_whole


@runtime_checkable
class Report(Protocol):
    """Receives the metrics of a supervised stage."""

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Called every `report_every` steps."""
        ...


@dataclass(frozen=True)
class FitConfig:
    """Settings of a supervised stage: AdamW with warm-up and cosine decay.

    Attributes:
        num_steps: optimizer steps, at least 2: the first is warm-up.
        batch_size: sequences per step.
        widths: slots of the short and of the long half of a batch; longer sequences are cut.
        learning_rate: the peak; it ends at a twentieth.
        weight_decay: decoupled, on matrices.
        average: decay of the running average of the parameters that is returned; 0 for none.
        max_grad_norm: global-norm clip.

    Raises:
        ValueError: a value is out of its range.
    """

    num_steps: int
    batch_size: int
    widths: tuple[int, ...]
    learning_rate: float
    weight_decay: float = 0.1
    average: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self):
        check_whole("num_steps", self.num_steps)
        check_whole("batch_size", self.batch_size)
        Range(0).check("learning_rate", self.learning_rate)
        Range(0).check("weight_decay", self.weight_decay)
        Range(0, above=True).check("max_grad_norm", self.max_grad_norm)
        FRACTION.check("average", self.average)
        if self.num_steps < 2:
            raise ValueError(
                f"num_steps must be at least 2, got {self.num_steps}: the first is warm-up, and "
                "there the learning rate is 0."
            )
        if not 0 < len(self.widths) <= self.batch_size or min(self.widths) < 1:
            raise ValueError(
                f"widths={self.widths} must be at least 1, and a batch have a sequence for each; "
                f"got batch_size={self.batch_size}."
            )

    def bounds(self) -> list[tuple[int, int]]:
        """(first, past the last) row of each part of a batch that is sorted by length."""
        edges = np.linspace(0, self.batch_size, len(self.widths) + 1).astype(int).tolist()
        return list(itertools.pairwise(edges))

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW as described."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, max(1, self.num_steps // 16), self.num_steps,
            self.learning_rate / 20,
        )  # fmt: skip
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.adamw(schedule, b2=0.98, weight_decay=self.weight_decay, mask=matrices),
        )


class Batch(eqx.Module):
    """Right-padded sequences of one width, with a target each (0 where there is none)."""

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    targets: Float[Array, " B"]


@runtime_checkable
class SupervisedLoss(Protocol):
    """A loss of a model on a batch."""

    def __call__(self, model: PyTree, parts: tuple[Batch, ...], /) -> Float[Array, ""]:
        """Mean over the whole batch."""
        ...


@runtime_checkable
class Augment(Protocol):
    """Changes a sequence, at random, each time that it is drawn."""

    def __call__(self, tokens: Sequence[int], rng: np.random.Generator) -> Sequence[int]:
        """The changed sequence."""
        ...


def unchanged(tokens: Sequence[int], rng: np.random.Generator) -> Sequence[int]:
    """The sequence as it is: no augmentation."""
    del rng
    return tokens


def pad_right(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences cut to `width` and padded with 0: tokens [B, S] and mask [B, S]."""
    lengths = np.minimum([len(s) for s in sequences], width)
    mask = np.arange(width)[None] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([s[:width] for s in sequences])
    return tokens, mask


def padded_batches(
    sequences: Sequence[Sequence[int]], width: int, batch_size: int
) -> Iterator[tuple[Int[Array, "B S"], Bool[Array, "B S"]]]:
    """All sequences in order, `batch_size` at a time; the last batch is filled with empty rows."""
    for start in range(0, len(sequences), batch_size):
        tokens, mask = pad_right(sequences[start : start + batch_size], width)
        fill = ((0, batch_size - len(tokens)), (0, 0))
        yield jnp.asarray(np.pad(tokens, fill)), jnp.asarray(np.pad(mask, fill))


def shuffled(
    count: int, size: int, rng: np.random.Generator, *, what: str
) -> Iterator[Int[np.ndarray, " size"]]:
    """Endless batches of the indices below `count`: each index once per epoch, reshuffled.

    Where `count` is no multiple of `size`, every epoch leaves out other indices.

    Args:
        count: number of rows.
        size: of a batch.
        rng: decides the order.
        what: name of the rows, for the error.

    Returns:
        An iterator over arrays of indices.

    Raises:
        ValueError: there are fewer than `size`.
    """
    if count < size:
        raise ValueError(f"{count} {what} do not fill one batch of {size}.")
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def batches(
    sequences: Sequence[Sequence[int]],
    targets: Sequence[float],
    config: FitConfig,
    rng: np.random.Generator,
    *,
    augment: Augment = unchanged,
) -> Iterator[tuple[Batch, ...]]:
    """Endless batches, reshuffled every epoch; each split by length into one part per width.

    The parts have fixed shapes, so that each compiles once. `augment` is called on every sequence
    that is drawn.

    Raises:
        ValueError: there are fewer sequences than `config.batch_size`.
    """
    bounds = config.bounds()
    for indices in shuffled(len(sequences), config.batch_size, rng, what="sequences"):
        rows = [(augment(sequences[i], rng), targets[i]) for i in indices]
        rows.sort(key=lambda row: len(row[0]))
        yield tuple(
            _batch(rows[low:high], width)
            for (low, high), width in zip(bounds, config.widths, strict=True)
        )


def _batch(rows: Sequence[tuple[Sequence[int], float]], width: int) -> Batch:
    tokens, mask = pad_right([tokens for tokens, _ in rows], width)
    targets = jnp.asarray([target for _, target in rows], jnp.float32)
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), targets)


class _FitState(NamedTuple):
    trainable: PyTree
    optimizer: optax.OptState
    average: PyTree


def _compile_step(
    loss: SupervisedLoss, static: PyTree, config: FitConfig
) -> Callable[[tuple[Batch, ...], _FitState], tuple[Float[Array, ""], _FitState]]:
    """The jitted optimizer step; it donates the state."""
    optimizer = config.optimizer()

    @eqx.filter_jit(donate="all-except-first")
    def step(batch: tuple[Batch, ...], state: _FitState) -> tuple[Float[Array, ""], _FitState]:
        value, gradient = jax.value_and_grad(lambda x: loss(eqx.combine(x, static), batch))(
            state.trainable
        )
        # Optax mixes types on purpose; a caller's strict promotion is for our own code.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradient, state.optimizer, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            average = optax.incremental_update(trainable, state.average, 1.0 - config.average)
        return value, _FitState(trainable, moments, average)

    return step


def fit(
    model: PyTree,
    loss: SupervisedLoss,
    data: Iterator[tuple[Batch, ...]],
    config: FitConfig,
    *,
    report: Report | None = None,
    report_every: int = 10,
    enough: Callable[[PyTree], bool] | None = None,
) -> PyTree:
    """`num_steps` of AdamW on `loss`, or fewer.

    Args:
        model: any Equinox model; its inexact arrays are trained.
        loss: of the model on a batch.
        data: batches, each a tuple of parts.
        config: settings.
        report: called with the step and the mean loss since the last call.
        report_every: steps from one report to the next.
        enough: called with the model at every report; true ends the training.

    Returns:
        The trained model, or the running average of it.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    trainable, static = eqx.partition(model, eqx.is_inexact_array)
    # The steps donate their state, and the caller's model must outlive them.
    trainable = jax.tree.map(jnp.copy, trainable)
    average = jax.tree.map(jnp.copy, trainable)
    state = _FitState(trainable, config.optimizer().init(trainable), average)
    step = _compile_step(loss, static, config)
    losses = []
    for index in range(1, config.num_steps + 1):
        value, state = step(next(data), state)
        losses.append(value)
        if index % report_every == 0 or index == config.num_steps:
            mean = float(np.mean(jax.device_get(losses)))
            losses = []
            if not np.isfinite(mean):
                raise FloatingPointError(
                    f"the loss is {mean} at step {index}; lower learning_rate="
                    f"{config.learning_rate:g}."
                )
            if report is not None:
                report(index, {"loss": mean})
            if enough is not None and enough(eqx.combine(state.trainable, static)):
                break
    return eqx.combine(state.average if config.average else state.trainable, static)
