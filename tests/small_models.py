"""A language model of two layers and a tokenizer of words, to be saved and trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from ppo_kernel.io.manifest import Manifest
from ppo_kernel.io.tokenizer import Tokenizer
from ppo_kernel.models import LanguageModel, TransformerConfig
from ppo_kernel.models.families.table import FAMILIES
from ppo_kernel.trainer.pretrained import CausalLM

SIZES = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "max_positions": 64,
}
CONFIG = TransformerConfig(**SIZES)


def word_tokenizer(size=19):
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(size - 3))]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "</s>"])
    return Tokenizer.of(backend, eos_token="</s>", pad_token="<pad>")


def make_lm(config=CONFIG, *, tokenizer=None, family="llama"):
    """`CausalLM.init` without compiling random numbers, and with every array random."""
    shapes = eqx.filter_eval_shape(lambda: LanguageModel.init(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)
    manifest = Manifest(FAMILIES[family], FAMILIES[family].describe(config), {})
    return CausalLM(model, tokenizer, manifest)
