"""Model folders: ours there and back, and ours against transformers' in both directions."""

import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import CONFIG, SIZES, make_lm, word_tokenizer

from ppo_kernel.config import GenerationConfig
from ppo_kernel.io.tokenizer import Tokenizer
from ppo_kernel.models import LanguageModel, RopeScaling, TransformerConfig, ValueModel
from ppo_kernel.rollout.generate import generate
from ppo_kernel.trainer.pretrained import CausalLM, RewardModel
from ppo_kernel.types import Prompts


@eqx.filter_jit
def _rows_of_logits(model, tokens, mask):
    hidden = model.hidden(tokens, mask)
    return model.unembed(hidden.reshape(-1, hidden.shape[-1]))


def logits(lm, tokens, mask):
    rows = _rows_of_logits(lm.model, jnp.asarray(tokens), jnp.asarray(mask))
    return np.asarray(rows, np.float32).reshape(*tokens.shape, -1)


@eqx.filter_jit
def _values(model, tokens, mask):
    return model(tokens, mask)


def scores(reward, tokens, mask):
    return np.asarray(_values(reward.model, jnp.asarray(tokens), jnp.asarray(mask)))[:, -1]


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_init(tmp_path):
    lm = CausalLM.init(jax.random.key(0), CONFIG, tokenizer=word_tokenizer())
    assert_same(lm.model, LanguageModel.init(jax.random.key(0), CONFIG))
    assert (lm.eos_token_ids, lm.pad_token_id) == ((1,), 0)
    lm.save_pretrained(tmp_path)
    assert_same(CausalLM.from_pretrained(tmp_path).model, lm.model)
    with pytest.raises(ValueError, match="qkv_bias=False"):
        CausalLM.init(jax.random.key(0), CONFIG, family="qwen2")
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        CausalLM.init(jax.random.key(0), CONFIG, family="gpt2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load(dtype, tmp_path):
    config = TransformerConfig(
        **SIZES, param_dtype=dtype, compute_dtype="float32", tie_embeddings=True
    )
    lm = make_lm(config, tokenizer=word_tokenizer())
    lm.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path, param_dtype=dtype, compute_dtype="float32")
    assert_same(loaded.model, lm.model)
    assert loaded.tokenizer == lm.tokenizer
    assert (loaded.eos_token_ids, loaded.pad_token_id) == ((1,), 0)


def test_reward_save_and_load(tmp_path):
    reward = RewardModel.on(make_lm())
    reward = reward.with_model(
        ValueModel(reward.model.trunk, jax.tree.map(lambda w: w + 0.5, reward.model.head))
    )
    reward.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert_same(loaded.model, reward.model)
    assert loaded.tokenizer is None


def test_types_are_the_callers(tmp_path):
    make_lm().save_pretrained(tmp_path)
    lm = CausalLM.from_pretrained(tmp_path, param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(lm.model)} == {jnp.dtype("bfloat16")}
    assert (lm.config.compute_dtype, lm.config.cache_dtype) == ("bfloat16", "bfloat16")
    lm = CausalLM.from_pretrained(tmp_path, compute_dtype="bfloat16", cache_dtype="float32")
    types = (lm.config.param_dtype, lm.config.compute_dtype, lm.config.cache_dtype)
    assert types == ("float32", "bfloat16", "float32")
    RewardModel.on(lm).save_pretrained(tmp_path / "reward")
    reward = RewardModel.from_pretrained(tmp_path / "reward", compute_dtype="bfloat16")
    assert (reward.config.param_dtype, reward.config.compute_dtype) == ("float32", "bfloat16")
    with pytest.raises(TypeError, match="cache_dtype"):
        RewardModel.from_pretrained(tmp_path / "reward", cache_dtype="float32")


def test_repr_tells_sizes_not_arrays():
    text = repr(make_lm(tokenizer=word_tokenizer()))
    assert text.startswith("CausalLM(llama, ")
    assert "2 layers of width 12" in text
    assert "Tokenizer(19 ids" in text
    assert len(text) < 200


def test_a_tied_model_may_store_its_output_matrix(tmp_path):
    lm = make_lm(TransformerConfig(**SIZES, tie_embeddings=True))
    lm.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = load_file(file)
    save_file({**content, "lm_head.weight": content["model.embed_tokens.weight"]}, file)
    assert_same(CausalLM.from_pretrained(tmp_path).model, lm.model)


@pytest.mark.parametrize(
    ("config", "generation", "eos", "pad"),
    [
        ({"eos_token_id": 5, "pad_token_id": 0}, {}, (5,), 0),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 6, "pad_token_id": 8}, (5, 6, 7), 8),
        ({"eos_token_id": 0}, {"eos_token_id": [0, 4]}, (0, 4), 0),
        ({"eos_token_id": 5, "pad_token_id": -1}, {}, (5,), 5),
        ({"eos_token_id": None}, {}, (), 0),
    ],
)
def test_special_ids(config, generation, eos, pad, tmp_path):
    make_lm().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **config)
    edit_json(tmp_path / "generation_config.json", **generation)
    again = tmp_path / "again"
    CausalLM.from_pretrained(tmp_path).save_pretrained(again)
    for folder in (tmp_path, again):
        lm = CausalLM.from_pretrained(folder)
        assert (lm.eos_token_ids, lm.pad_token_id) == (eos, pad)


def test_entries_of_no_concern_are_kept(tmp_path):
    make_lm().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", attention_dropout=0.1, rope_theta=1.0, rope_scaling=None)
    edit_json(tmp_path / "generation_config.json", top_p=0.8)
    CausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_dropout"] == 0.1
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_p"] == 0.8


@pytest.mark.parametrize("facade", [CausalLM, RewardModel])
def test_refusals_of_a_folder(facade, tmp_path):
    with pytest.raises(FileNotFoundError, match="never downloaded"):
        facade.from_pretrained("owner/model")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        facade.from_pretrained(tmp_path)
    make_lm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float64 needs"):
        facade.from_pretrained(tmp_path, param_dtype="float64")
    with pytest.raises(ValueError, match="got 'int8'"):
        facade.from_pretrained(tmp_path, param_dtype="int8")
    edit_json(tmp_path / "config.json", model_type="mamba")
    with pytest.raises(ValueError, match="model_type='mamba'"):
        facade.from_pretrained(tmp_path)


def test_each_facade_refuses_the_other_kind(tmp_path):
    make_lm().save_pretrained(tmp_path / "lm")
    RewardModel.on(make_lm()).save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"no score\.weight.*RewardModel\.on"):
        RewardModel.from_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"RewardModel\.from_pretrained"):
        CausalLM.from_pretrained(tmp_path / "reward")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"20 ids.*19 rows"):
        CausalLM.init(jax.random.key(0), CONFIG, tokenizer=word_tokenizer(20))
    make_lm().save_pretrained(tmp_path)
    word_tokenizer(20).save(tmp_path)
    with pytest.raises(ValueError, match=r"20 ids.*19 rows"):
        CausalLM.from_pretrained(tmp_path)


def test_score_texts():
    lm = make_lm(tokenizer=word_tokenizer())
    reward = RewardModel.on(lm)
    assert reward.score_texts(["w1 ", "w2 "], ["w3", "w4 w5"]) == [0.0, 0.0]
    head = jax.tree.map(lambda w: w + jnp.arange(12.0), reward.model.head)
    reward = reward.with_model(ValueModel(reward.model.trunk, head))
    together = reward.score_texts(["w1 ", "w2 "], ["w3", "w4 w5"])
    alone = reward.score_texts(["w1 "], ["w3"]) + reward.score_texts(["w2 "], ["w4 w5"])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    ids = np.asarray(lm.tokenizer.encode(["w2 w4 w5"]))
    expected = scores(reward, ids, np.ones(ids.shape, bool))
    np.testing.assert_allclose(together[1:], expected, atol=1e-5)
    with pytest.raises(ValueError, match="2 prompts for 1"):
        reward.score_texts(["w1", "w2"], ["w3"])
    with pytest.raises(ValueError, match="no tokenizer"):
        RewardModel.on(make_lm()).score_texts(["w1"], ["w3"])


# Against transformers ---------------------------------------------------------------------

REASON = "comparisons with transformers need it and a CPU build of torch (extra 'hf')"
IGNORED = "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"


@pytest.fixture(scope="module")
def hf():
    """torch and transformers, silent and single-minded."""
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


COMMON = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = [  # name in transformers, its settings, how it saves
    pytest.param("Llama", {"head_dim": 6, "rope_parameters": LLAMA3}, {}, id="llama3"),
    pytest.param("Qwen2", {"hidden_size": 24}, {}, id="qwen2"),
    pytest.param("Qwen3", {"head_dim": 6}, {}, id="qwen3"),
]
MORE_CASES = [
    pytest.param("Llama", {"hidden_size": 24}, {}, id="llama2"),
    pytest.param("Llama", {"tie_word_embeddings": True, "head_dim": 6}, {}, id="llama-tied"),
    pytest.param("Qwen2", {"hidden_size": 24, "tie_word_embeddings": True}, {}, id="qwen2-tied"),
    pytest.param("Llama", {"head_dim": 6}, {"max_shard_size": "2KB"}, id="sharded"),
    pytest.param("Llama", {"head_dim": 6}, {"dtype": "bfloat16"}, id="bfloat16"),
]


def write_theirs(hf, folder, name, kind, settings, saving):
    """A folder of random weights: no zero bias and no norm of ones that could hide a mistake."""
    torch, transformers = hf
    config = getattr(transformers, f"{name}Config")(**COMMON | settings)
    model = getattr(transformers, f"{name}For{kind}")(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            vector = parameter.dim() == 1
            parameter.copy_(0.5 * torch.randn(parameter.shape) + (1.0 if vector else 0.0))
    saving = dict(saving)
    model.to(getattr(torch, saving.pop("dtype", "float32"))).save_pretrained(folder, **saving)


def theirs(hf, auto, folder, tokens, mask):
    """Logits of the model in a folder, with the positions that padding implies."""
    torch, transformers = hf
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
    valid = torch.tensor(mask)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens),
            attention_mask=valid.long(),
            position_ids=(valid.long().cumsum(1) - 1).clamp(min=0),
        ).logits.numpy()


def padded_batch():
    rng = np.random.default_rng(0)
    lengths = np.array([40, 3, 17])
    mask = np.arange(40)[None] >= 40 - lengths[:, None]
    return np.where(mask, rng.integers(2, 19, mask.shape), 0), mask


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(("name", "settings", "saving"), CASES + MORE_CASES)
def test_causal_lm_agrees_with_transformers(name, settings, saving, hf, tmp_path):
    write_theirs(hf, tmp_path, name, "CausalLM", settings, saving)
    assert (tmp_path / "model.safetensors").is_file() == ("max_shard_size" not in saving)
    tokens, mask = padded_batch()
    lm = CausalLM.from_pretrained(tmp_path)
    ours = logits(lm, tokens, mask)[mask]
    assert ours.std() > 0.1
    expected = theirs(hf, "AutoModelForCausalLM", tmp_path, tokens, mask)[mask]
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    lm.save_pretrained(tmp_path / "again")
    again = theirs(hf, "AutoModelForCausalLM", tmp_path / "again", tokens, mask)[mask]
    np.testing.assert_allclose(ours, again, atol=1e-4)


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(("name", "settings", "saving"), CASES)
def test_reward_model_agrees_with_transformers(name, settings, saving, hf, tmp_path):
    settings = {**settings, "num_labels": 1}
    write_theirs(hf, tmp_path, name, "SequenceClassification", settings, saving)
    tokens, mask = padded_batch()
    auto = "AutoModelForSequenceClassification"
    reward = RewardModel.from_pretrained(tmp_path)
    ours = scores(reward, tokens, mask)
    assert ours.std() > 0.1
    expected = theirs(hf, auto, tmp_path, tokens, mask)[:, 0]
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    reward.save_pretrained(tmp_path / "again")
    again = theirs(hf, auto, tmp_path / "again", tokens, mask)[:, 0]
    np.testing.assert_allclose(ours, again, atol=1e-4)


@pytest.mark.filterwarnings(*IGNORED)
def test_several_labels_are_refused(hf, tmp_path):
    settings = {"head_dim": 6, "num_labels": 3}
    write_theirs(hf, tmp_path, "Llama", "SequenceClassification", settings, {})
    with pytest.raises(ValueError, match=r"score\.weight.*\[3, 12\].*\[1, 12\]"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_scaling": RopeScaling(4.0, 1.0, 4.0, 16), "rope_theta": 100.0}),
        ("qwen2", {"qkv_bias": True, "tie_embeddings": True}),
        ("qwen3", {"qk_norm": True}),
    ],
)
def test_transformers_loads_a_model_of_ours(family, settings, hf, tmp_path):
    # transformers reads any tokenizer beside a Qwen2 by that family's rules, of bytes.
    tokenizer = None if family == "qwen2" else word_tokenizer()
    lm = make_lm(TransformerConfig(**SIZES, **settings), tokenizer=tokenizer, family=family)
    lm.save_pretrained(tmp_path / "lm")
    tokens, mask = padded_batch()
    expected = theirs(hf, "AutoModelForCausalLM", tmp_path / "lm", tokens, mask)[mask]
    np.testing.assert_allclose(logits(lm, tokens, mask)[mask], expected, atol=1e-4)

    reward = RewardModel.on(lm)
    head = jax.tree.map(lambda w: w + jnp.arange(12.0), reward.model.head)
    reward = reward.with_model(ValueModel(reward.model.trunk, head))
    reward.save_pretrained(tmp_path / "reward")
    ours = scores(reward, tokens, mask)
    auto = "AutoModelForSequenceClassification"
    expected = theirs(hf, auto, tmp_path / "reward", tokens, mask)[:, 0]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_greedy_generation_agrees_with_transformers(name, hf, tmp_path):
    torch, transformers = hf
    settings = {"hidden_size": 24, "head_dim": 6}
    write_theirs(hf, tmp_path, name, "CausalLM", settings, {})
    tokens, mask = (x[:, -17:] for x in padded_batch())
    lm = CausalLM.from_pretrained(tmp_path)
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(3))
    config = GenerationConfig(
        max_new_tokens=8,
        eos_token_ids=lm.eos_token_ids,
        pad_token_id=lm.pad_token_id,
        top_k=1,
    )
    ours = eqx.filter_jit(generate)(lm.model, prompts, jax.random.key(0), config=config).tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = model.generate(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=8,
        do_sample=False,
    )[:, 17:].numpy()
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(np.asarray(ours)[:, : expected.shape[1]], expected)


@pytest.mark.filterwarnings(*IGNORED)
def test_transformers_loads_a_tokenizer_of_ours(hf, tmp_path):
    _, transformers = hf
    lm = make_lm(tokenizer=word_tokenizer())
    lm.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["w1 w2", "w3 </s> w4", "unknown w5"]
    assert tokenizer(texts)["input_ids"] == lm.tokenizer.encode(texts)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    tokenizer.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again") == lm.tokenizer


def test_torch_is_not_needed():
    """The package never imports it: this module loads torch only inside the fixture."""
    package = {name for name in sys.modules if name.startswith("ppo_kernel")}
    assert "ppo_kernel.trainer.pretrained" in package
    for name in package:
        assert not {"torch", "transformers"} & set(vars(sys.modules[name]))
