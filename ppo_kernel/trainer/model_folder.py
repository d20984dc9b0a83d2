"""The shared half of `CausalLM` and `RewardModel`: a model, its tokenizer and its JSON files."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from ..io.folders import existing_folder, staged
from ..io.manifest import Manifest
from ..io.safetensors import save_weights
from ..io.tokenizer import Tokenizer
from ..models.config import TransformerConfig
from ..models.families.family import Weight
from ..models.heads import LanguageModel, ValueModel
from ..types import Prompts

_WIDTH_STEP = 64

ModelT = TypeVar("ModelT", LanguageModel, ValueModel)
FolderT = TypeVar("FolderT", bound="ModelFolder")


@dataclass(frozen=True, eq=False, repr=False)
class ModelFolder(Generic[ModelT]):
    """A model, its tokenizer and its manifest. Immutable: `with_model` makes a changed one.

    Attributes:
        model: the pytree that the kernel trains.
        tokenizer: None where the folder has none.
        manifest: the folder's JSON files.
    """

    model: ModelT
    tokenizer: Tokenizer | None
    manifest: Manifest

    def with_model(self: FolderT, model: LanguageModel | ValueModel) -> FolderT:
        """The same with other parameters."""
        return replace(self, model=model)

    @property
    def config(self) -> TransformerConfig:
        """Sizes and types."""
        return self.model.trunk.config

    @property
    def pad_token_id(self) -> int:
        """What unused slots hold; any id, masks say which slots are used."""
        return self.manifest.pad_token_id(self.tokenizer)

    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that reads text.

        Raises:
            ValueError: there is none.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so it cannot read text.")
        return self.tokenizer

    def prompts(self, ids: Sequence[Sequence[int]], *, new_tokens: int = 0) -> Prompts:
        """Token ids as prompts of one of few widths: each compiles a program.

        Args:
            ids: those of N texts.
            new_tokens: that follow them.

        Returns:
            N prompts, numbered from 0.

        Raises:
            ValueError: a text without a token, more tokens than positions, or
                parameters that a training step has consumed.
        """
        if any(x.is_deleted() for x in jax.tree.leaves(eqx.filter(self.model, eqx.is_array))):
            raise ValueError(
                "the parameters of this model were consumed by a training step; take the policy "
                "from the state that it returned (PPOTrainer.policy)."
            )
        longest, most = max(map(len, ids), default=1), self.config.max_positions
        if longest + new_tokens > most:
            raise ValueError(
                f"a text of {longest} tokens and {new_tokens} new tokens exceed the model's "
                f"max_position_embeddings={most}; shorten it, or lower max_new_tokens."
            )
        width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
        return Prompts.from_ids(ids, self.pad_token_id, width)

    def __repr__(self) -> str:
        config, kind = self.config, self.manifest.family.model_type
        count = sum(x.size for x in jax.tree.leaves(eqx.filter(self.model, eqx.is_array)))
        return (
            f"{type(self).__name__}({kind}, {count:,} parameters in {config.param_dtype}, "
            f"{config.num_layers} layers of width {config.hidden_size}, "
            f"vocabulary {config.vocab_size}, {self.tokenizer or 'no tokenizer'})"
        )


class OpenFolder(NamedTuple):
    """A folder whose JSON files are read, and whose weights are not."""

    manifest: Manifest
    config: TransformerConfig
    tokenizer: Tokenizer | None


def open_folder(
    path: str | os.PathLike,
    *,
    attention: Callable,
    param_dtype: str,
    compute_dtype: str | None,
    cache_dtype: str | None = None,
) -> OpenFolder:
    """Read config.json and the tokenizer of a folder. Arguments as in `CausalLM.from_pretrained`.

    Raises:
        FileNotFoundError: no such folder, or it has no config.json.
        ValueError: a model that is not supported, a tokenizer larger than its embedding, or an
            EOS, pad or BOS id without a row in it.
    """
    folder = existing_folder(path)
    manifest = Manifest.read(folder)
    compute_dtype = param_dtype if compute_dtype is None else compute_dtype
    config = manifest.family.to_config(
        manifest.config,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        cache_dtype=compute_dtype if cache_dtype is None else cache_dtype,
        attention=attention,
    )
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(folder) if has_tokenizer else None
    manifest.check(tokenizer)
    check_config(config, tokenizer)
    return OpenFolder(manifest, config, tokenizer)


def check_config(config: TransformerConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse types that are switched off, and a tokenizer with more ids than the embedding.

    Raises:
        ValueError: either of them.
    """
    types = (config.param_dtype, config.compute_dtype, config.cache_dtype)
    if "float64" in types and jnp.result_type(float) != jnp.float64:
        raise ValueError('float64 needs jax.config.update("jax_enable_x64", True) first.')
    if tokenizer is not None and tokenizer.num_ids > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.num_ids} ids, but the embedding only "
            f"{config.vocab_size} rows (vocab_size); resize the embedding, or pass the tokenizer "
            "that belongs to the model."
        )


def save_folder(
    saved: ModelFolder,
    path: str | os.PathLike,
    *,
    shapes: Any,
    weights: tuple[Weight, ...],
    classifier: bool,
) -> None:
    """Write a model folder at `path`, whole or not at all.

    Args:
        saved: what is written.
        path: of the folder.
        shapes: the model that its config says.
        weights: which array becomes which tensor.
        classifier: a sequence classifier instead of a language model.

    Raises:
        ValueError: the model is not of these shapes.
    """
    with staged(path) as folder:
        saved.manifest.write(folder, saved.config, tokenizer=saved.tokenizer, classifier=classifier)
        if saved.tokenizer is not None:
            saved.tokenizer.save(folder)
        save_weights(folder, saved.model, shapes, weights)
