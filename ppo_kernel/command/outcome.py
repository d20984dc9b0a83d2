"""What PPO has changed: samples of two policies on the same prompts, side by side."""

from collections.abc import Mapping
from typing import Any

from .display import Display, table
from .evaluate import Samples

MEANS = {
    "reward": "reward",
    "distinct_2": "distinct-2",
    "sft_perplexity": "perplexity under the SFT model",
    "length": "length, tokens",
}
"""Figure of `compare` -> what a person reads."""


def held_out_metrics(samples: Samples) -> dict[str, float]:
    """What is recorded of held-out prompts while PPO runs."""
    return {
        "held_out_reward": float(samples.scores.mean()),
        "held_out_kl": float(samples.sequence_kl.mean()),
    }


def sample_rows(samples: Samples) -> list[dict[str, Any]]:
    """Rows of `samples.jsonl`."""
    return [
        {"prompt": p, "response": r, "reward": float(s), "kl": float(k)}
        for p, r, s, k in zip(
            samples.prompts, samples.responses, samples.scores, samples.sequence_kl, strict=True
        )
    ]


def compare(before: Samples, after: Samples) -> dict[str, float]:
    """The figures that say whether PPO did what it should."""
    deviation = float(before.scores.std())
    gain = float(after.scores.mean() - before.scores.mean())
    return {
        "reward_before": float(before.scores.mean()),
        "reward_after": float(after.scores.mean()),
        "reward_gain_in_sft_deviations": gain / max(deviation, 1e-9),
        "kl_per_sequence": float(after.sequence_kl.mean()),
        "distinct_2_before": before.distinct_2,
        "distinct_2_after": after.distinct_2,
        "distinct_2_kept": after.distinct_2 / max(before.distinct_2, 1e-9),
        "sft_perplexity_before": before.reference_perplexity,
        "sft_perplexity_after": after.reference_perplexity,
        "length_before": float(before.lengths.mean()),
        "length_after": float(after.lengths.mean()),
    }


def print_outcome(
    display: Display,
    before: Samples,
    after: Samples,
    figures: dict[str, float],
    *,
    means: Mapping[str, str] = MEANS,
) -> None:
    """Eight prompts with both responses, and the means of all."""
    rows = [
        [prompt.strip(), first.strip(), second.strip()]
        for prompt, first, second in zip(
            before.prompts[:8], before.responses, after.responses, strict=False
        )
    ]
    display.print(table("Held-out prompts", ["prompt", "SFT", "PPO"], rows))
    rows = [
        [label, f"{figures[f'{key}_before']:.3f}", f"{figures[f'{key}_after']:.3f}"]
        for key, label in means.items()
    ]
    display.print(table("Mean over the held-out prompts", ["", "SFT", "PPO"], rows))
