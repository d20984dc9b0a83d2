"""The programs of the README run as they stand there, with nothing supplied from outside."""

import re
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_kernel.learner import epochs
from ppo_kernel.rollout import generate

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BY_HAND, COMPILED, SWEEP = BLOCKS[:3]


@pytest.fixture
def drawn(monkeypatch):
    """What each iteration draws, as a list per kind: the noise of tokens, the minibatch order."""
    records = {"noise": [], "order": []}

    def watched(function, kind):
        def call(*arguments):
            result = function(*arguments)
            jax.debug.callback(lambda x: records[kind].append(np.asarray(x)), result)
            return result

        return call

    monkeypatch.setattr(generate, "sampling_noise", watched(generate.sampling_noise, "noise"))
    monkeypatch.setattr(epochs, "minibatch_order", watched(epochs.minibatch_order, "order"))
    return records


def assert_nothing_repeats(drawn):
    jax.effects_barrier()
    for kind, each in drawn.items():
        assert len(each) == 3, f"three iterations draw their {kind} once each"
        for one, other in combinations(each, 2):
            assert (one != other).any(), f"two iterations have the same {kind}"
        each.clear()


def test_the_programs_run_as_pasted_and_no_iteration_repeats_another(drawn):
    names = {}
    exec(BY_HAND, names)
    assert_nothing_repeats(drawn)
    assert int(names["state"].iteration) == 3
    by_hand = names["metrics"]
    exec(COMPILED, names)
    assert_nothing_repeats(drawn)
    assert int(names["state"].iteration) == 3
    for name in ("actor_loss", "critic_loss", "approx_kl"):
        np.testing.assert_allclose(by_hand[name], names["metrics"][name], rtol=1e-3, atol=1e-6)
    exec(SWEEP, names)
    assert names["rewards"].shape == (3, 4, 5)
    assert jnp.isfinite(names["rewards"]).all()
