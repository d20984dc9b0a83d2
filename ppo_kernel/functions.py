"""Functions that a caller passes: what each takes, by name, and what it returns."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PyTree

from .types import LossInputs, Rollout, Scalar, TokenMetrics, ValueLossInputs


@runtime_checkable
class RewardFn(Protocol):
    """A reward.

    A JAX-traceable one (a function, or an `eqx.Module` with parameters) sits inside the single
    program; a Python one runs between `collect` and `learn`.
    """

    def __call__(self, rollout: Rollout, /) -> PyTree:
        """One score per sequence [B], or one per token [B, T], reward units.

        Or (scores, metrics): names -> numbers per sequence [B], whose mean over the sequences that
        have a token is reported.
        """
        ...


@runtime_checkable
class KLEstimator(Protocol):
    """An estimator of the KL divergence from the reference."""

    def __call__(self, log_ratio: Float[Array, "*shape"], /) -> Float[Array, "*shape"]:
        """log(policy / reference) per token -> KL estimate per token, nats."""
        ...


@runtime_checkable
class Reduction(Protocol):
    """What each token weighs in a loss."""

    def __call__(self, mask: Bool[Array, "M T"], /) -> Float[Array, "M T"]:
        """Response mask of a whole minibatch -> weights; a loss is sum(weights * loss)."""
        ...


@runtime_checkable
class AdvantageEstimator(Protocol):
    """Stage 4: `advantages.gae`, or one of your own."""

    def __call__(
        self,
        rewards: Float[Array, "B T"],
        values: Float[Array, "B T"],
        mask: Bool[Array, "B T"],
        bootstrap_values: Float[Array, " B"],
        *,
        gamma: Scalar,
        lam: Scalar,
        groups: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """(advantages, returns).

        Args:
            rewards: per token, reward units; not defined where `mask` is false.
            values: V_t, before token t; 0 without a critic.
            mask: valid tokens.
            bootstrap_values: value after the last valid token.
            gamma, lam: as in `gae`.
            groups: sequences with the same number answer the same prompt.
        """
        ...


@runtime_checkable
class PolicyLoss(Protocol):
    """The policy's loss: `losses.ppo_policy_loss`, or one of your own."""

    def __call__(
        self,
        inputs: LossInputs,
        *,
        clip_ratio_low: Scalar,
        clip_ratio_high: Scalar,
        dual_clip: Scalar | None,
    ) -> tuple[Float[Array, "M T"], TokenMetrics]:
        """(loss per token, metrics)."""
        ...


@runtime_checkable
class ValueLoss(Protocol):
    """The critic's loss: `losses.ppo_value_loss`, or one of your own."""

    def __call__(
        self, inputs: ValueLossInputs, *, value_clip: Scalar | None
    ) -> tuple[Float[Array, "M T"], TokenMetrics]:
        """(loss per token, metrics)."""
        ...
