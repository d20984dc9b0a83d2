"""Models as folders in the layout of Hugging Face: load, save, start from nothing."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ..config import GenerationConfig
from ..io.folders import existing_folder
from ..io.manifest import Manifest
from ..io.safetensors import WeightFiles, load_weights
from ..io.tokenizer import Tokenizer
from ..models.config import TransformerConfig
from ..models.families.family import Family
from ..models.families.table import family_named
from ..models.heads import LanguageModel, ValueModel
from ..models.kernels.causal_attention import attend_causally
from ..models.transformer import Transformer
from ..rollout.generate import generate
from .model_folder import ModelFolder, check_config, open_folder, save_folder
from .text_reward import rollout_texts


@dataclass(frozen=True, eq=False, repr=False)
class CausalLM(ModelFolder[LanguageModel]):
    """A language model with its tokenizer.

    Immutable: `with_model` makes a changed one.

    Attributes:
        model: the pytree that the kernel trains.
        tokenizer: None where the folder has none.
        manifest: the folder's JSON files.
    """

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        config: TransformerConfig,
        *,
        tokenizer: Tokenizer | None = None,
        family: str | Family = "llama",
    ) -> "CausalLM":
        """A model with random weights; consumes `key`.

        Raises:
            ValueError: the family cannot express `config`, or the vocabulary is too small.
        """
        family = family_named(family) if isinstance(family, str) else family
        check_config(config, tokenizer)
        manifest = Manifest(family, family.describe(config), {})
        return cls(LanguageModel.init(key, config), tokenizer, manifest)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        param_dtype: str = "float32",
        compute_dtype: str | None = None,
        cache_dtype: str | None = None,
        attention: Callable = attend_causally,
    ) -> "CausalLM":
        """Load a folder with config.json, weights in safetensors and, if any, tokenizer.json.

        Args:
            path: a local folder; nothing is downloaded.
            param_dtype: type of the parameters, whatever the folder has.
            compute_dtype: type of the activations; None takes `param_dtype`.
            cache_dtype: type of the KV cache; None takes `compute_dtype`.
            attention: see `TransformerConfig`.

        Returns:
            The model, with the folder's tokenizer and settings.

        Raises:
            FileNotFoundError: no such folder, or it has no config.json.
            ValueError: a model that is not supported, or tensors that do not fit it.
        """
        manifest, config, tokenizer = open_folder(
            path, attention=attention, param_dtype=param_dtype, compute_dtype=compute_dtype,
            cache_dtype=cache_dtype,
        )  # fmt: skip
        with WeightFiles(existing_folder(path)) as files:
            if "score.weight" in files.names:
                raise ValueError(
                    f"{os.fspath(path)} holds a sequence classifier (score.weight), not a "
                    "language model: use RewardModel.from_pretrained."
                )
            config = _with_the_stored_head(files, config, manifest.family)
            weights = manifest.family.causal_lm_weights(config)
            # Some writers store the output matrix of a tied model once more.
            ignored = (_HEAD,) if config.tie_embeddings else ()
            model = load_weights(files, _policy_shapes(config), weights, ignored=ignored)
        return cls(model, tokenizer, manifest)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write a folder at `path` that we and transformers' AutoModelForCausalLM load.

        Raises:
            ValueError: the model is no longer of the shape that its config says.
        """
        weights = self.manifest.family.causal_lm_weights(self.config)
        save_folder(
            self, path, shapes=_policy_shapes(self.config), weights=weights, classifier=False
        )

    def generate(
        self,
        prompts: Sequence[str],
        key: Key[Array, ""],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> list[str]:
        """Sample one response to each prompt, as text.

        Args:
            prompts: text.
            key: consumed.
            max_new_tokens: T.
            temperature: > 0. For greedy decoding set `top_k=1`; any temperature does.
            top_k, top_p: see `restrict_logits`.

        Returns:
            The responses, without special tokens, in the same order.

        Raises:
            ValueError: no tokenizer, a prompt without a token, more tokens than the model has
                positions, a number out of its range, or parameters that a training step consumed.
        """
        config = GenerationConfig(
            max_new_tokens,
            self.eos_token_ids,
            self.pad_token_id,
            top_k=top_k,
            banned_token_ids=self.banned_token_ids,
        )
        tokenizer = self.required_tokenizer()
        batch = self.prompts(tokenizer.encode_prompts(prompts), new_tokens=max_new_tokens)
        rollout = _generate(
            self.model, batch, key, config=config, temperature=temperature, top_p=top_p
        )
        return rollout_texts(tokenizer, rollout, skip_special_tokens=True).responses

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a response."""
        return self.manifest.eos_token_ids(self.tokenizer)

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Rows of the embedding that stand for no text; a rollout never samples them."""
        if self.tokenizer is None:
            return ()
        return self.tokenizer.ids_without_text(self.config.vocab_size)

    @property
    def num_token_ids(self) -> int:
        """One more than the largest id in a rollout: what every model that reads it must know."""
        if self.tokenizer is None:
            return self.config.vocab_size
        return max(self.tokenizer.num_ids, self.pad_token_id + 1)


@dataclass(frozen=True, eq=False, repr=False)
class RewardModel(ModelFolder[ValueModel]):
    """A model of one score per sequence: that of its last token.

    Immutable like `CausalLM`.

    Attributes:
        model: the pytree; every slot has a value, a score is the last valid one.
        tokenizer: None where the folder has none.
        manifest: the folder's JSON files.
    """

    @classmethod
    def on(cls, causal_lm: CausalLM) -> "RewardModel":
        """The trunk of `causal_lm` under a zero head: where reward training starts."""
        model = ValueModel.on(causal_lm.model.trunk)
        return cls(model, causal_lm.tokenizer, causal_lm.manifest)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        param_dtype: str = "float32",
        compute_dtype: str | None = None,
        attention: Callable = attend_causally,
    ) -> "RewardModel":
        """Load a folder of a sequence classifier with one label.

        Arguments as in `CausalLM.from_pretrained`; a reward model has no KV cache.

        Raises:
            FileNotFoundError: no such folder, or it has no config.json.
            ValueError: no classifier, one of several labels, or as in `CausalLM`.
        """
        manifest, config, tokenizer = open_folder(
            path, attention=attention, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        with WeightFiles(existing_folder(path)) as files:
            if "score.weight" not in files.names:
                raise ValueError(
                    f"{os.fspath(path)} has no score.weight: it is a language model, not a "
                    "sequence classifier. To train a reward model from it, use "
                    "RewardModel.on(CausalLM.from_pretrained(path))."
                )
            weights = manifest.family.classifier_weights(config)
            model = load_weights(files, _reward_shapes(config), weights)
        return cls(model, tokenizer, manifest)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write a folder at `path`, for transformers' AutoModelForSequenceClassification too.

        That class scores the last token which is not the pad id, so it agrees with us on texts
        that end with another one.

        Raises:
            ValueError: the model is no longer of the shape that its config says.
        """
        weights = self.manifest.family.classifier_weights(self.config)
        save_folder(
            self, path, shapes=_reward_shapes(self.config), weights=weights, classifier=True
        )

    def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score for each prompt with its response, read by this model's own tokenizer.

        Args:
            prompts, responses: text; a response is read right after its prompt.

        Returns:
            The scores, in the same order.

        Raises:
            ValueError: no tokenizer, lists of different lengths, or a text without a token.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses.")
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        tokenizer = self.required_tokenizer()
        ids = [ids + tokenizer.frame.back for ids in tokenizer.encode_prompts(texts)]
        batch = self.prompts(ids)
        scores = _last_values(self.model, batch.tokens, batch.mask)
        return np.asarray(scores, np.float64).tolist()


_generate = eqx.filter_jit(generate)
_HEAD = "lm_head.weight"


def _with_the_stored_head(
    files: WeightFiles, config: TransformerConfig, family: Family
) -> TransformerConfig:
    """The settings, untied where the folder has a head of other values than the embedding."""
    if not config.tie_embeddings:
        return config
    embedding = next(w for w in family.causal_lm_weights(config) if w.path == "trunk.embedding")
    if not files.differ(embedding.name, _HEAD):
        return config
    warnings.warn(
        f"{files.folder} says tie_word_embeddings=true, but its {_HEAD} differs from "
        f"{embedding.name}: the stored head is used, as transformers 5 does. Set "
        "tie_word_embeddings to false in config.json, or remove the tensor.",
        stacklevel=3,
    )
    return replace(config, tie_embeddings=False)


@eqx.filter_jit
def _last_values(
    model: ValueModel, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> Float[Array, " B"]:
    return model(tokens, mask)[:, -1]


def _policy_shapes(config: TransformerConfig) -> LanguageModel:
    return eqx.filter_eval_shape(lambda: LanguageModel.init(jax.random.key(0), config))


def _reward_shapes(config: TransformerConfig) -> ValueModel:
    return eqx.filter_eval_shape(lambda: ValueModel.on(Transformer.init(jax.random.key(0), config)))
