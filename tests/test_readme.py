"""The code on the first screen of the README runs as it stands there."""

import re
from pathlib import Path

import jax.numpy as jnp
import tiny

import ppo_kernel
from ppo_kernel.config import Hyperparams

README = Path(__file__).parents[1] / "README.md"


def test_the_five_stages_run_as_shown():
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    hyperparams, policy = Hyperparams(), tiny.language_model()
    names = {name: getattr(ppo_kernel, name) for name in dir(ppo_kernel)} | {
        "jnp": jnp,
        "policy": policy,
        "reference": policy,
        "critic": tiny.value_model(),
        "prompts": tiny.prompts(),
        "generation": tiny.generation(),
        "config": tiny.iteration_config(),
        "hyperparams": hyperparams,
        "state": tiny.start(hyperparams, policy=policy),
        "reward": tiny.even_tokens,
    }
    exec(block, names)
    assert int(names["state"].iteration) == 1
    assert jnp.isfinite(names["metrics"]["actor_loss"])
