"""Bad input gets a `ValueError` that names it: at construction, or while the program is traced."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import tiny

from ppo_kernel.advantages import gae
from ppo_kernel.config import (
    GenerationConfig,
    Hyperparams,
    IterationConfig,
    OptimizerHyperparams,
)
from ppo_kernel.learner.state import Learner
from ppo_kernel.losses import ppo_policy_loss
from ppo_kernel.program import compile_iteration
from ppo_kernel.rewards import token_rewards
from ppo_kernel.rollout.generate import generate


@pytest.fixture(autouse=True)
def unhooked(monkeypatch):
    """As users run the package: without the import hook, which refuses shapes by itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


WORDS = {"top_k": "3", "samples_per_prompt": 1.5, "decode_slots": 2.0, "max_new_tokens": None,
         "min_new_tokens": -1, "pad_token_id": 2**40, "eos_token_ids": [1]}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WORDS.items())
def test_settings_of_a_rollout(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must .*got {value!r}".replace("[", r"\[")):
        GenerationConfig(**{"max_new_tokens": 4} | {name: value})


STATIC = {"num_epochs": 1.5, "num_minibatches": None, "microbatch_size": np.nan, "reduction": None,
          "logprob_chunk_size": 0, "response_widths": 3, "kl_estimator": "k1",
          "generation": None}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), STATIC.items())
def test_static_settings_of_an_iteration(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {value!r}"):
        IterationConfig(**{"generation": tiny.generation()} | {name: value})


@pytest.mark.parametrize("widths", [(1.5,), (0, 2), (4, 4), (8, 2)])
def test_widths_that_are_none_or_do_not_ascend(widths):
    with pytest.raises(ValueError, match=r"^response_widths must be"):
        IterationConfig(tiny.generation(), response_widths=widths)


@pytest.mark.parametrize("value", ["0.2", True, 1j, None])
def test_hyper_parameters_that_are_no_numbers(value):
    with pytest.raises(ValueError, match=r"^gamma must be a real number, got"):
        Hyperparams(gamma=value)


@pytest.mark.parametrize("shape", [(4,), (1,), (2, 3)])
def test_hyper_parameters_that_are_no_scalars(shape):
    with pytest.raises(ValueError, match=r"^kl_coef must be a scalar, got shape .* vmap"):
        Hyperparams(kl_coef=jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"^learning_rate must be a scalar, got shape"):
        OptimizerHyperparams(learning_rate=np.zeros(shape))


PROMPTS = tiny.prompts()
OTHER_PROMPTS = {
    "tokens must be .*one prompt and one slot": {"tokens": PROMPTS.tokens[:, :0]},
    "tokens must be .*at least": {"tokens": PROMPTS.tokens[None]},
    r"mask must be an array of shape \(8, 4\)": {"mask": PROMPTS.mask[:1]},
    r"sample_ids must be an array of shape \(8,\)": {"sample_ids": jnp.arange(1)},
    "mask must be of type bool": {"mask": PROMPTS.mask.astype(jnp.int32)},
    "tokens must be of type integer": {"tokens": PROMPTS.tokens.astype(jnp.float32)},
    "sample_ids must be of type integer": {"sample_ids": jnp.arange(8.0)},
}


@pytest.mark.parametrize("message", OTHER_PROMPTS)
def test_prompts(message):
    prompts = replace(PROMPTS, **OTHER_PROMPTS[message])
    with pytest.raises(ValueError, match=message):
        write(prompts)


NUMBERS = {"temperature": (0.0, -1.0, np.nan), "top_p": (0.0, 2.0, np.nan),
           "min_p": (-0.5, 2.0, np.nan)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values]
)
def test_numbers_of_a_rollout(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        write(PROMPTS, **{name: value})


def write(prompts, **settings):
    policy = tiny.language_model()
    return generate(policy, prompts, jax.random.key(0), config=tiny.generation(), **settings)


SHAPE = (2, 3)
ARRAYS = (jnp.zeros(SHAPE), jnp.zeros(SHAPE), jnp.ones(SHAPE, bool), jnp.zeros(2))


@pytest.mark.parametrize(
    ("place", "name", "other"),
    [
        (0, "rewards", jnp.zeros((2, 4))), (1, "values", jnp.zeros((1, 3))),
        (3, "bootstrap_values", jnp.zeros(1)), (3, "bootstrap_values", 0.0),
    ],
)  # fmt: skip
def test_gae(place, name, other):
    arguments = [*ARRAYS[:place], other, *ARRAYS[place + 1 :]]
    with pytest.raises(ValueError, match=f"^{name} must be an array of shape"):
        gae(*arguments, gamma=1.0, lam=0.95)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (1, 3), (3,)])
def test_rewards(shape):
    with pytest.raises(ValueError, match=r"^scores must be an array of shape \(2,\) or \(2, 3\)"):
        token_rewards(
            jnp.zeros(shape), ARRAYS[0], ARRAYS[2], jnp.ones(2, bool), kl_coef=0.0,
            kl_estimator=None,
        )  # fmt: skip


def start(**changes):
    hyperparams, policy = Hyperparams(), tiny.language_model()
    compiled = compile_iteration(config=tiny.iteration_config(), **changes)
    state = compiled.init(policy, tiny.value_model(), jax.random.key(3), hyperparams)
    return compiled, state, policy, hyperparams


@pytest.mark.parametrize("scores", [jnp.zeros((8, 1)), jnp.zeros(()), jnp.zeros(1), [0.0] * 8])
def test_scores_between_the_halves(scores):
    compiled, state, policy, hyperparams = start()
    collected = compiled.collect(state, policy, PROMPTS, hyperparams)
    with pytest.raises(
        ValueError, match=r"^the scores of a reward .* an array of shape \(8,\) or \(8, 5\)"
    ):
        compiled.learn(state, collected, scores, hyperparams)


def mean_loss(inputs, **settings):
    loss, metrics = ppo_policy_loss(inputs, **settings)
    return jnp.mean(loss), metrics


def narrow(*arguments, **settings):
    return tuple(x[:, :1] for x in gae(*arguments, **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": Learner(policy_loss=mean_loss)}, "the loss of policy_loss must be an array"),
        (
            {"learner": Learner(value_loss=lambda *a, **k: (0.0, {}))},
            "the loss of value_loss must be",
        ),
        ({"advantage_estimator": lambda r, *a, **k: r}, "advantage_estimator must return"),
        ({"advantage_estimator": narrow}, "advantages of the estimator must be an array of shape"),
    ],
)
def test_functions_that_return_another_shape(changes, message):
    compiled, state, policy, hyperparams = start(**changes)
    with pytest.raises(ValueError, match=message):
        compiled.step(state, policy, PROMPTS, hyperparams, tiny.even_tokens)


def test_a_state_that_was_consumed_or_shares_arrays():
    compiled, state, policy, hyperparams = start()
    with pytest.raises(ValueError, match="shares arrays with another argument"):
        compiled.step(state, state.policy, PROMPTS, hyperparams, tiny.even_tokens)
    after, _ = compiled.step(state, policy, PROMPTS, hyperparams, tiny.even_tokens)
    with pytest.raises(ValueError, match="go on with the state that it returned"):
        compiled.step(state, policy, PROMPTS, hyperparams, tiny.even_tokens)
    compiled.step(after, policy, PROMPTS, hyperparams, tiny.even_tokens)


@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.sgd(1.0), optax.lion(1e-4)])
@pytest.mark.parametrize("side", ["actor", "critic"])
def test_an_optimizer_with_a_sign_of_its_own(side, optimizer):
    learner = Learner(**{f"{side}_optimizer": optimizer})
    models = tiny.language_model(), tiny.value_model()
    with pytest.raises(ValueError, match=f"{side}_optimizer applies a learning rate and a sign"):
        learner.init(*models, jax.random.key(0), Hyperparams())


@pytest.mark.parametrize(
    "optimizer",
    [optax.scale_by_lion(), optax.trace(0.9), optax.identity(),
     optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))],
)  # fmt: skip
def test_directions_are_taken(optimizer):
    models = tiny.language_model(), tiny.value_model()
    Learner(actor_optimizer=optimizer).init(*models, jax.random.key(0), Hyperparams())
