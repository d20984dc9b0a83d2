"""Every array function beside its twin in `reference`: one row each, with how to draw cases."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import hypothesis.strategies as st
import numpy as np

from ppo_kernel import advantages, losses, rewards
from ppo_kernel.ops import kl, logprobs, masked, sampling
from ppo_kernel.testing import log_ratios, logits, masks, reals, token_ids
from reference import advantages as ref_advantages
from reference import losses as ref_losses
from reference import rewards as ref_rewards
from reference.ops import kl as ref_kl
from reference.ops import logprobs as ref_logprobs
from reference.ops import masked as ref_masked
from reference.ops import sampling as ref_sampling

VOCABULARY = 7
ALL = ("float32", "float64", "bfloat16")
WIDE = ("float32", "float64")


@dataclass(frozen=True)
class Row:
    """A function, its twin, and how to draw (arguments, keyword arguments) for both.

    `mask` is the place of the mask among the arguments, where there is one; with `per_row`
    reordering the sequences reorders the result; with `narrow` bfloat16 stays bfloat16;
    without `plants` no argument is a number that could be NaN, or a NaN has no meaning.
    """

    name: str
    shipped: Callable
    reference: Callable
    cases: Callable[[tuple[int, int]], st.SearchStrategy]
    dtypes: tuple[str, ...] = ALL
    mask: int | None = None
    per_row: bool = True
    narrow: bool = False
    plants: bool = True

    def __repr__(self):
        return self.name


def arguments(*strategies, **keywords):
    return st.tuples(st.tuples(*strategies), st.fixed_dictionaries(keywords))


def one_of(*values):
    return st.sampled_from(values)


def with_weight(logprobs_from_hidden):
    """The output head's weight as an argument, so that it has the dtype of the case."""

    def head(hidden, tokens, weight, **keywords):
        return logprobs_from_hidden(hidden, tokens, lambda rows: rows @ weight, **keywords)

    return head


def flags(shape):
    return reals(shape, 1).map(lambda x: x > 0)


def on_logits(shape, *more):
    return arguments(logits((*shape, VOCABULARY)), *more)


def on_values(shape):
    return arguments(reals(shape), masks(shape))


def on_log_ratios(shape):
    return arguments(log_ratios(shape))


def on_mask(shape):
    return arguments(masks(shape))


def on_hidden(shape):
    return arguments(
        reals((*shape, 3), 2), token_ids(shape, VOCABULARY), reals((3, VOCABULARY), 2),
        temperature=one_of(0.5, 1.0, 2.0), chunk_size=one_of(None, 5),
    )  # fmt: skip


def on_scores(shape, per_token=False):
    return arguments(
        reals(shape if per_token else shape[:1]), log_ratios(shape), masks(shape), flags(shape[:1]),
        kl_coef=one_of(0.0, 0.05, 1.0), missing_eos_penalty=one_of(0.0, 1.5),
        score_clip=one_of(None, 2.0),
    )  # fmt: skip


def on_rollout(shape):
    return arguments(
        reals(shape), reals(shape), masks(shape), reals(shape[:1]),
        gamma=one_of(0.0, 0.9, 1.0), lam=one_of(0.0, 0.95, 1.0),
    )  # fmt: skip


def on_policy(shape, **more):
    # e^(k/8) is far from 1 +- every one of these, or exactly 1 for k = 0.
    clips = {"clip_ratio_low": one_of(0.0, 0.2, 0.5), "clip_ratio_high": one_of(0.0, 0.2, 0.28)}
    return arguments(log_ratios(shape), reals(shape, 3), reals(shape), **clips, **more)


def on_critic(shape):
    return arguments(reals(shape), reals(shape), reals(shape), value_clip=one_of(None, 0.2, 3.0))


def on_controller(shape):
    del shape
    kls = one_of(-1.0, 0.0, 5.75, 6.25, 100.0, np.inf, np.nan).map(np.asarray)
    coefficients = one_of(0.0, 0.05, 1.0).map(np.asarray)
    return arguments(coefficients, kls, target=one_of(6.0), horizon=one_of(1e4, 300.0, 10.0),
                     num_sequences=one_of(64))  # fmt: skip


def on_counts(shape):
    """Rows of probabilities c / 32: no mass or quotient of theirs is near a threshold below."""
    cuts = st.lists(st.integers(0, 32), min_size=VOCABULARY - 1, max_size=VOCABULARY - 1)
    row = cuts.map(lambda c: np.diff([0, *sorted(c), 32]) / 32)
    rows = st.tuples(*[row] * shape[0]).map(np.stack)
    top_k = {"top_k": one_of(1, 3, VOCABULARY + 1)}
    top_p = {"top_p": st.integers(0, 31).map(lambda n: (n + 0.5) / 32) | one_of(1.0)}
    min_p = {"min_p": st.integers(0, 36).map(lambda n: n / 37)}
    return st.tuples(
        st.tuples(rows.map(lambda p: np.log(p, out=np.full(p.shape, -np.inf), where=p > 0))),
        one_of({}, top_k, top_p, min_p, top_k | top_p | min_p).flatmap(st.fixed_dictionaries),
    )


def on_ban(shape):
    return arguments(logits((shape[0], VOCABULARY)), where=one_of(np.array(True), np.array(False)),
                     token_ids=one_of((), (0,), (2, 5)))  # fmt: skip


def on_noise(shape, vocabulary=VOCABULARY):
    uniforms = st.floats(0, 1 - 2**-24, width=32)
    noise = st.lists(uniforms, min_size=2 * shape[0], max_size=2 * shape[0])
    noise = noise.map(lambda u: np.array(u).reshape(-1, 2))
    seeds = st.integers(0, 2**16)
    case = arguments(seeds.map(lambda seed: sparse_logits(seed, shape[0], vocabulary)), noise)
    return case.filter(lambda case: away_from_edges(*case[0]))


def sparse_logits(seed, rows, vocabulary):
    """Half of the tokens banned, the first never. From a seed: too many to draw one by one."""
    random = np.random.default_rng(seed)
    z = random.integers(-24, 25, (rows, vocabulary)) / 8
    banned = random.random(z.shape) < 0.5
    return np.where(banned & (np.arange(vocabulary) > 0), -np.inf, z)


def away_from_edges(logits, noise):
    """No token changes when the noise moves by more than the rounding of a running sum."""
    drawn = [
        ref_sampling.sample_tokens(logits, np.clip(noise + np.array([i, j]), 0, 1 - 2**-24))[0]
        for i in (-1e-5, 1e-5)
        for j in (-1e-5, 1e-5)
    ]
    return all(np.array_equal(drawn[0], tokens) for tokens in drawn)


def twin(module, reference, name, cases, **settings):
    return Row(name, getattr(module, name), getattr(reference, name), cases, **settings)


def rewarding(kind, cases, dtypes=ALL):
    """token_rewards with an estimator by name, the shipped or the reference's own."""
    pair = [
        partial(module.token_rewards, kl_estimator=None if kind is None else getattr(ops, kind))
        for module, ops in ((rewards, kl), (ref_rewards, ref_kl))
    ]
    return Row(f"token_rewards-{kind}", *pair, cases, dtypes, mask=2)


ROWS = [
    twin(masked, ref_masked, "masked_sum", on_values, mask=1, per_row=False),
    twin(masked, ref_masked, "masked_mean", on_values, mask=1, per_row=False),
    twin(masked, ref_masked, "whiten", on_values, mask=1),
    twin(losses, ref_losses, "token_mean", on_mask, dtypes=WIDE, mask=0, plants=False),
    twin(losses, ref_losses, "sequence_mean", on_mask, dtypes=WIDE, mask=0, plants=False),
    Row("fixed_mean", losses.fixed_mean(5), ref_losses.fixed_mean(5), on_mask, WIDE, mask=0,
        plants=False),
    twin(kl, ref_kl, "clamp_log_ratio", on_log_ratios, narrow=True),
    twin(kl, ref_kl, "is_clamped", on_log_ratios),
    twin(kl, ref_kl, "k1", on_log_ratios, narrow=True),
    twin(kl, ref_kl, "k2", on_log_ratios, narrow=True),
    twin(kl, ref_kl, "k3", on_log_ratios, narrow=True),
    Row("k1_with_gradient_of_k3", kl.with_gradient_of(kl.k1, kl.k3),
        ref_kl.with_gradient_of(ref_kl.k1, ref_kl.k3), on_log_ratios, narrow=True),
    twin(logprobs, ref_logprobs, "token_logprobs",
         lambda shape: on_logits(shape, token_ids(shape, VOCABULARY))),
    twin(logprobs, ref_logprobs, "entropy", on_logits),
    Row("logprobs_from_hidden", with_weight(logprobs.logprobs_from_hidden),
        with_weight(ref_logprobs.logprobs_from_hidden), on_hidden, WIDE, per_row=False),
    twin(sampling, ref_sampling, "restrict_logits", on_counts, dtypes=WIDE, plants=False),
    twin(sampling, ref_sampling, "ban_tokens", on_ban, narrow=True),
    twin(sampling, ref_sampling, "sample_tokens", on_noise, dtypes=WIDE, plants=False),
    Row("sample_tokens-3-blocks", sampling.sample_tokens, ref_sampling.sample_tokens,
        partial(on_noise, vocabulary=600), WIDE, plants=False),
    rewarding("k1", on_scores),
    rewarding("k3", on_scores, dtypes=WIDE),
    rewarding(None, partial(on_scores, per_token=True), dtypes=WIDE),
    twin(rewards, ref_rewards, "last_valid", on_mask, dtypes=WIDE, mask=0, plants=False),
    twin(rewards, ref_rewards, "adaptive_kl_coef", on_controller, dtypes=WIDE, per_row=False),
    twin(advantages, ref_advantages, "gae", on_rollout, mask=2),
    twin(losses, ref_losses, "clipped_policy_loss",
         partial(on_policy, dual_clip=one_of(None, 1.5, 3.0))),
    twin(losses, ref_losses, "is_clipped", on_policy),
    twin(losses, ref_losses, "clipped_value_loss", on_critic),
]  # fmt: skip
