"""The laws of the iteration, each against the shipped code; `pytest -k law_N` runs law N.

Law 3 is in test_law_3_update.py, 5 in test_advantages.py, 6 in test_law_6_enumeration.py, 7 in
ops/test_logprobs.py, 9 in train/test_familiar_surface.py and 10 in test_oracle.py.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ppo_kernel.config import Hyperparams
from ppo_kernel.evaluation import full_sequences, predicting_slots, response_logprobs
from ppo_kernel.iteration import ppo_iteration
from ppo_kernel.models.families.table import FAMILIES
from ppo_kernel.ops.sampling import sampling_noise
from ppo_kernel.program import compile_iteration
from ppo_kernel.rollout.generate import generate
from ppo_kernel.sharding import make_mesh, place
from ppo_kernel.types import Prompts

GENERATE = eqx.filter_jit(generate)
SAMPLING = {
    "plain": ({}, {}),
    "tempered": ({}, {"temperature": 0.7}),
    "top-k": ({"top_k": 3}, {"temperature": 1.3}),
    "top-p": ({}, {"top_p": 0.6}),
    "min-p": ({}, {"min_p": 0.7}),
    "all": ({"top_k": 5, "min_new_tokens": 2}, {"top_p": 0.8, "min_p": 0.05, "temperature": 0.9}),
}
POLICIES = {
    "llama": lambda: tiny.language_model(),
    "tied": lambda: tiny.language_model(tie_embeddings=True),
    "qwen2": lambda: _with_biases(tiny.language_model(qkv_bias=True)),
    "qwen3": lambda: tiny.language_model(qk_norm=True),
    "unrolled": lambda: tiny.language_model(unroll=2),
    "local-and-global": lambda: tiny.language_model(**tiny.LOCAL_AND_GLOBAL),
    "classic": lambda: tiny.language_model(**tiny.CLASSIC),
    "recurrent": lambda: tiny.RecurrentPolicy(jax.random.key(0)),
}


def _with_biases(model):
    attention = model.trunk.blocks.attention
    layers = [attention.query, attention.key, attention.value]
    keys = jax.random.split(jax.random.key(9), 3)
    biases = [jax.random.normal(k, x.bias.shape) for k, x in zip(keys, layers, strict=True)]
    return eqx.tree_at(
        lambda m: [getattr(m.trunk.blocks.attention, n).bias for n in ("query", "key", "value")],
        model,
        biases,
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["rollout", "recomputed"])
@pytest.mark.parametrize(
    ("name", "model"),
    [(name, "llama") for name in SAMPLING] + [("all", "local-and-global"), ("all", "classic")],
)
def test_law_1_unchanged_parameters_have_no_kl(name, model, recompute):
    static, traced = SAMPLING[name]
    hyperparams, policy = Hyperparams(**traced), POLICIES[model]()
    config = tiny.iteration_config(tiny.generation(**static), recompute_old_logprobs=recompute)
    state = tiny.start(hyperparams, policy=policy)
    collected = compile_iteration(config=config).collect(state, policy, tiny.prompts(), hyperparams)
    log_ratios = collected.old_logprobs - collected.evaluation.reference_logprobs
    assert float(jnp.max(jnp.abs(log_ratios))) <= (0.0 if recompute else 2e-5)
    restricted = collected.rollout.behaviour_logprobs - collected.rollout.logprobs
    assert float(restricted.min()) >= -1e-5, "a restriction can only make a token more likely"
    assert (float(restricted.max()) > 0.01) == (name not in ("plain", "tempered"))


@pytest.mark.parametrize("recompute", [False, True], ids=["rollout", "recomputed"])
def test_law_1_unchanged_parameters_have_ratio_one(recompute):
    static, traced = SAMPLING["all"]
    hyperparams = tiny.hyperparams(rate=0.0, **traced)
    policy = tiny.language_model()
    config = tiny.iteration_config(tiny.generation(**static), recompute_old_logprobs=recompute)
    state = tiny.start(hyperparams, policy=policy)
    _, metrics = tiny.one_step(state, policy, tiny.prompts(), hyperparams, config)
    assert abs(float(metrics["kl_divergence"])) <= (0.0 if recompute else 1e-4)
    # Not 0: the update reads minibatches, a matrix product of another shape, and rounds anew.
    assert float(metrics["approx_kl"]) <= (1e-12 if recompute else 1e-9)
    assert float(metrics["clip_fraction"]) == 0.0
    assert float(metrics["skipped_minibatches"]) == 0.0


def test_law_2_names_every_family():
    assert set(FAMILIES) <= set(POLICIES), "a new family is a row of POLICIES too"


@pytest.mark.parametrize("name", POLICIES)
def test_law_2_cached_decode_is_the_teacher_forced_forward(name, float64):
    policy = POLICIES[name]()
    config = tiny.generation(samples_per_prompt=2, max_new_tokens=6)
    rollout = GENERATE(policy, tiny.prompts(), jax.random.key(0), config=config, temperature=0.8)
    hidden = policy.hidden(*full_sequences(rollout))
    logprobs, _ = response_logprobs(policy, rollout, hidden, temperature=0.8)
    assert int(rollout.lengths.min()) < 6, "some response should end early"
    np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_law_2_padding_pad_id_and_neighbours_change_nothing(name, float64):
    policy, key = POLICIES[name](), jax.random.key(0)
    base = GENERATE(policy, tiny.prompts(), key, config=tiny.generation())
    wide = GENERATE(policy, tiny.prompts(width=7), key, config=tiny.generation())
    # The pad id may equal EOS, or any token that means something.
    other = GENERATE(
        policy, tiny.prompts(pad=5), key, config=tiny.generation(pad_token_id=tiny.EOS)
    )
    alone = jax.tree.map(lambda x: x[2:3], tiny.prompts())
    single = GENERATE(policy, alone, key, config=tiny.generation())
    for variant in (wide, other):
        np.testing.assert_array_equal(base.mask, variant.mask)
        np.testing.assert_array_equal(base.tokens[base.mask], variant.tokens[variant.mask])
        np.testing.assert_allclose(base.logprobs, variant.logprobs, atol=1e-12)
    np.testing.assert_array_equal(base.tokens[2:3], single.tokens)
    np.testing.assert_allclose(base.logprobs[2:3], single.logprobs, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "local-and-global", "classic", "recurrent"])
def test_law_4_a_completion_depends_on_its_own_coordinates_alone(name, float64):
    policy, batch, key = POLICIES[name](), tiny.prompts(), jax.random.key(1)
    config = tiny.generation(samples_per_prompt=2)
    base = GENERATE(policy, batch, key, config=config)
    order = jnp.array([5, 0, 7, 2])
    part = jax.tree.map(lambda x: x[order], batch)
    moved = GENERATE(policy, part, key, config=config)
    rows = (order[:, None] * 2 + jnp.arange(2)[None]).reshape(-1)
    np.testing.assert_array_equal(moved.tokens, base.tokens[rows])
    np.testing.assert_array_equal(moved.sample_ids, base.sample_ids[rows])
    renamed = Prompts(batch.tokens, batch.mask, batch.sample_ids + 1)
    assert (GENERATE(policy, renamed, key, config=config).tokens != base.tokens).any()


def test_law_4_float32_tokens_are_the_same_wherever_the_margin_allows():
    """The margin: how far the noise is from where another token would be drawn."""
    policy, batch, key = tiny.language_model(), tiny.prompts(), jax.random.key(1)
    config = tiny.generation(samples_per_prompt=2)
    base = GENERATE(policy, batch, key, config=config)
    order = jnp.array([5, 0, 7, 2])
    moved = GENERATE(policy, jax.tree.map(lambda x: x[order], batch), key, config=config)
    rows = (order[:, None] * 2 + jnp.arange(2)[None]).reshape(-1)
    noise = sampling_noise(key, base.sample_ids, config.max_new_tokens)
    same_noise = sampling_noise(key, moved.sample_ids, config.max_new_tokens)
    np.testing.assert_array_equal(same_noise, noise[rows])
    hidden = eqx.filter_jit(policy.hidden)(*full_sequences(base))
    hidden = predicting_slots(hidden, config.max_new_tokens)
    edges = jnp.cumsum(jax.nn.softmax(hidden @ policy.output.T), axis=-1)[..., :-1]
    margin = jnp.min(jnp.abs(edges - noise[..., 1:]), axis=-1)
    # After one unclear draw the rest of a response may be another one.
    clear = np.cumprod((margin > 1e-5) | ~base.mask, axis=1).astype(bool)[rows]
    np.testing.assert_array_equal(moved.tokens[clear], base.tokens[rows][clear])
    assert clear.mean() > 0.9


def test_law_4_iterations_do_not_repeat_their_noise(float64):
    hyperparams = tiny.hyperparams(rate=0.0)
    policy, config = tiny.language_model(), tiny.iteration_config(num_epochs=1)
    state = tiny.start(hyperparams, policy=policy)
    inputs = (policy, tiny.prompts(), hyperparams)
    compiled = compile_iteration(config=config)
    first = compiled.collect(state, *inputs)
    state, _ = compiled.step(state, *inputs, tiny.even_tokens)
    second = compiled.collect(state, *inputs)
    assert (first.rollout.tokens != second.rollout.tokens).any()


def test_law_8_collect_then_learn_is_the_single_program(float64):
    hyperparams = tiny.hyperparams(rate=1e-2)
    policy, batch = tiny.language_model(), tiny.prompts()
    config = tiny.iteration_config(tiny.generation(samples_per_prompt=2))
    state = tiny.start(hyperparams, policy=policy)
    whole, metrics = tiny.one_step(state, policy, batch, hyperparams, config)
    compiled = compile_iteration(config=config)
    collected = compiled.collect(state, policy, batch, hyperparams)
    scores = tiny.even_tokens(collected.rollout)
    halves, halves_metrics = compiled.learn(state, collected, scores, hyperparams)
    tiny.assert_trees_close(halves, whole, 1e-10)
    tiny.assert_trees_close(halves_metrics, metrics, 1e-10)


@pytest.mark.parametrize("devices", [None, 4], ids=["one device", "a mesh"])
def test_law_8_steps_in_one_program_are_steps_one_after_the_other(float64, devices):
    hyperparams = tiny.hyperparams(rate=1e-2, kl_target=0.1)
    mesh = None if devices is None else make_mesh(devices)
    policy = place(tiny.language_model(), mesh, "parameter")
    state = place(tiny.start(hyperparams, policy=policy), mesh, "parameter")
    lengths = ((3, 1, 4, 2, 4, 3, 2, 1), (4, 4, 1, 2, 3, 3, 4, 2), (1, 2, 2, 4, 4, 1, 3, 3))
    batches = [tiny.prompts(row) for row in lengths]
    compiled = compile_iteration(config=tiny.iteration_config(), mesh=mesh)
    one, each = jax.tree.map(jnp.copy, state), []
    for batch in batches:
        one, metrics = compiled.step(one, policy, batch, hyperparams, tiny.even_tokens)
        each.append(metrics)
    together = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    many, metrics = compiled.steps(state, policy, together, hyperparams, tiny.even_tokens)
    assert state.policy.trunk.embedding.is_deleted(), "the state is donated"
    assert int(many.iteration) == len(batches)
    tiny.assert_trees_close(many, one, 1e-10)
    tiny.assert_trees_close(metrics, jax.tree.map(lambda *xs: jnp.stack(xs), *each), 1e-10)


def test_steps_refuse_one_batch():
    policy, compiled = tiny.language_model(), compile_iteration(config=tiny.iteration_config())
    inputs = (policy, tiny.prompts(), Hyperparams(), tiny.even_tokens)
    with pytest.raises(ValueError, match=r"stacked to \[S, N, P\], got \(8, 4\)"):
        compiled.steps(tiny.start(Hyperparams(), policy=policy), *inputs)


def test_law_8_vmap_over_seeds_and_coefficients_is_a_loop(float64):
    config, batch, policy = tiny.iteration_config(), tiny.prompts(), tiny.language_model()
    reference = tiny.language_model(seed=8)
    swept = [
        tiny.hyperparams(actor={"learning_rate": r}, clip_ratio_low=c, clip_ratio_high=c, kl_coef=k)
        for r, c, k in ((1e-2, 0.1, 0.0), (3e-3, 0.3, 0.2))
    ]
    states = [tiny.start(h, seed=s, policy=policy) for s, h in enumerate(swept)]

    def iteration(state, hyperparams):
        return ppo_iteration(
            state, reference, batch, hyperparams, reward=tiny.even_tokens, config=config
        )

    def stack(*xs):
        return jnp.stack(xs)

    together = eqx.filter_jit(eqx.filter_vmap(iteration))(
        jax.tree.map(stack, *states), jax.tree.map(stack, *swept)
    )
    compiled = eqx.filter_jit(iteration)
    for index, (state, hyperparams) in enumerate(zip(states, swept, strict=True)):
        alone = compiled(state, hyperparams)
        tiny.assert_trees_close(jax.tree.map(lambda x, i=index: x[i], together), alone, 1e-9)


def test_the_recurrent_policy_learns_in_the_whole_iteration(float64):
    policy = tiny.RecurrentPolicy(jax.random.key(0))
    critic = tiny.RecurrentCritic(tiny.RecurrentPolicy(jax.random.key(1)), jnp.zeros(8))
    hyperparams = tiny.hyperparams(1e-2, actor={"learning_rate": 3e-2}, kl_coef=0.0)
    config = tiny.iteration_config(tiny.generation(samples_per_prompt=8), num_epochs=4)
    compiled = compile_iteration(config=config)
    state = tiny.start(hyperparams, policy=policy, critic=critic)
    rewards = []
    for _ in range(12):
        state, metrics = compiled.step(state, policy, tiny.prompts(), hyperparams, tiny.even_tokens)
        rewards.append(float(metrics["mean_reward"]))
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 1.0, rewards
