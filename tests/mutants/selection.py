"""Which tests judge which file, the fastest and most specific first."""

import re
import signal
from pathlib import Path

import hypothesis


def twins(*names: str) -> str:
    return rf"test_twins\.py::.*\[({'|'.join(names)})"


GRADIENTS = r"learner/test_update\.py::test_gradient_of_a_minibatch_equals_the_reference\[None\]"
UPDATE = (
    GRADIENTS,
    r"learner/test_update\.py",
    r"learner/test_update_edges\.py",
    r"learner/test_(trainable|no_critic)\.py",
    r"learner/test_own_losses\.py",
    r"test_by_hand\.py",
    r"learner/test_holes\.py",
    r"test_oracle\.py::test_law_10_the_whole.*\[(shared-adaptive|grouped)\]",
    r"test_edges\.py::test_(a_planted_nan|nothing_is|rows_without|a_batch_without|overflowing)",
    r"test_edge_programs\.py::test_bfloat16",
    r"test_program\.py::test_the_state_is_donated",
    r"test_refusals\.py::test_(functions_that|an_optimizer|directions)",
)

ROLLOUT = (
    r"rollout/test_rollout_reference\.py",
    r"test_laws\.py::test_law_[24].*\[(tied|recurrent)\]",
    r"test_program\.py::test_generation_stops",
    r"test_laws\.py::test_law_1_unchanged_parameters_have_no_kl\[(all|plain)-llama-rollout\]",
    r"test_edge_programs\.py::test_(an_eos|a_ban|a_pad_id|a_vocabulary_of_one)",
    r"rollout/test_slots\.py::test_slots_for_every",
    r"rollout/test_growing_cache\.py",
    r"test_refusals\.py::test_(prompts|numbers)",
)

CHECKS = {
    "ops/kl.py": (r"ops/test_kl\.py", twins("clamp", "is_clamped", "k1", "k2", "k3")),
    "ops/logprobs.py": (
        r"ops/test_logprobs\.py",
        twins("token_logprobs", "entropy", "logprobs_from_hidden"),
    ),
    "ops/masked.py": (
        r"ops/test_masked\.py",
        twins("masked_", "whiten"),
    ),
    "ops/sampling.py": (
        r"ops/test_sampling\.py",
        twins("restrict_logits", "ban_tokens", "sample_tokens"),
    ),
    "rewards.py": (
        r"test_rewards\.py",
        twins("token_rewards", "last_valid", "adaptive_kl_coef"),
        r"test_refusals\.py::test_rewards",
    ),
    "advantages.py": (r"test_advantages\.py", twins("gae"), r"test_refusals\.py::test_gae"),
    "losses.py": (
        r"test_losses\.py",
        twins("clipped_", "is_clipped", "token_mean", "sequence_mean", "fixed_mean"),
        r"ops/test_masked\.py",
        r"learner/test_update\.py::test_steps_equal_the_reference\[nothing",
    ),
    "learner/epochs.py": UPDATE,
    "learner/gradient.py": UPDATE,
    "learner/state.py": UPDATE,
    "learner/optimizer.py": UPDATE,
    "rollout/decoding.py": ROLLOUT,
    "rollout/prompts.py": (r"rollout/test_prompts\.py", r"test_refusals\.py::test_prompts"),
    "learner/reports.py": UPDATE,
    "rollout/lockstep.py": ROLLOUT,
    "rollout/generate.py": ROLLOUT,
    "rollout/slots.py": (
        r"rollout/test_slots\.py",
        r"rollout/test_growing_cache\.py",
    ),
    "evaluation.py": (
        r"test_evaluation\.py",
        r"test_laws\.py::test_law_2_cached.*\[tied\]",
        r"test_oracle\.py::test_law_10_the_whole.*\[shared-adaptive\]",
    ),
}
"""File -> patterns of test ids, in the order in which the tests run."""


def test_files(file: str) -> list[str]:
    names = [pattern.split("::")[0].replace("\\", "") for pattern in CHECKS[file]]
    return list(dict.fromkeys(names))


class Selection:
    """A pytest plugin: the chosen tests in order, no shrinking, and an alarm for each test."""

    def __init__(self, patterns: tuple[str, ...], function: str, report: Path, seconds: int):
        self.patterns, self.report, self.seconds = patterns, report, seconds
        self.functions = [name.strip("_") for name in function.split(".") if name]

    def pytest_configure(self, config):
        # The alarm has its default action: it ends the process even inside a compiled loop.
        signal.alarm(self.seconds)
        hypothesis.settings.register_profile(
            "mutants",
            parent=hypothesis.settings.get_profile("ppo_kernel"),
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
        )
        hypothesis.settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items):
        chosen = []
        for item in items:
            matches = (i for i, x in enumerate(self.patterns) if re.search(x, item.nodeid))
            rank = next(matches, None)
            if rank is not None:
                elsewhere = not any(name in item.nodeid for name in self.functions)
                chosen.append(((elsewhere, rank), item))
        items[:] = [item for _, item in sorted(chosen, key=lambda pair: pair[0])]

    def pytest_runtest_logstart(self, nodeid):
        signal.alarm(self.seconds)
        self.report.write_text(nodeid.removeprefix("tests/"))
