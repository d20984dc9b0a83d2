"""The JSON files that stand beside the weights in a model folder."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.config import TransformerConfig
from ..models.families.family import Family
from ..models.families.table import family_of
from .folders import read_json, write_json
from .tokenizer import Tokenizer

# Written by transformers for its own use, or in two spellings; ours replace or outlive them.
_STALE = ("_name_or_path", "transformers_version", "layer_types", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Manifest:
    """The JSON files of a model folder. Entries that are not used here are kept for saving.

    Attributes:
        family: of the checkpoint.
        config: config.json.
        generation: generation_config.json, {} where there is none.
    """

    family: Family
    config: dict[str, Any]
    generation: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """That of a folder.

        Raises:
            FileNotFoundError: it has no config.json.
            ValueError: a damaged file, or a model_type that is not known.
        """
        config = read_json(folder / "config.json")
        return cls(family_of(config), config, read_json(folder / "generation_config.json", {}))

    def eos_token_ids(self, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """Every id that ends a text, whichever of the files names it; sorted.

        A tuned chat model may end a turn with a token that the tokenizer alone names.
        """
        ids = {*_ids(self.config, "eos_token_id"), *_ids(self.generation, "eos_token_id")}
        own = None if tokenizer is None else tokenizer.eos_id
        return tuple(sorted(ids if own is None else ids | {own}))

    def pad_token_id(self, tokenizer: Tokenizer | None) -> int:
        """The id in a file or the tokenizer, else an EOS id, else 0."""
        told = self._named_pad_id(tokenizer)
        return (*self.eos_token_ids(tokenizer), 0)[0] if told is None else told

    def check(self, tokenizer: Tokenizer | None) -> None:
        """Refuse ids that no row of the embedding stands for.

        Args:
            tokenizer: the folder's.

        Raises:
            ValueError: more ids in the tokenizer than `vocab_size` in config.json, or an EOS, pad
                or BOS id that is not below it; names the key and the file.
        """
        rows = self.config.get("vocab_size")
        if rows is None:
            return
        if tokenizer is not None and tokenizer.num_ids > rows:
            raise ValueError(
                f"the tokenizer has {tokenizer.num_ids} ids, but the embedding only {rows} rows "
                "(vocab_size); resize the embedding, or pass the tokenizer that belongs to the "
                "model."
            )
        files = {"config.json": self.config, "generation_config.json": self.generation}
        for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
            for file, entries in files.items():
                outside = [i for i in _ids(entries, key) if i >= rows]
                if outside:
                    raise ValueError(
                        f"{key} in {file} is {outside[0]}, but the embedding has {rows} rows "
                        "(vocab_size): no token has that id; correct or remove it."
                    )
        if tokenizer is not None:
            silent = set(self.eos_token_ids(tokenizer)) & set(tokenizer.ids_without_text(rows))
            if silent:
                warnings.warn(
                    f"eos_token_id {sorted(silent)} stands for no text of the tokenizer, so it is "
                    "never sampled and ends no response.",
                    stacklevel=2,
                )

    def write(
        self,
        folder: Path,
        config: TransformerConfig,
        *,
        tokenizer: Tokenizer | None,
        classifier: bool = False,
    ) -> None:
        """Write config.json and generation_config.json for a model of these settings.

        Args:
            folder: exists.
            config: of the model; decides sizes and type.
            tokenizer: tells the special ids that the files do not.
            classifier: one label on top instead of a language model.

        Raises:
            ValueError: the family cannot express `config`.
        """
        ids: dict[str, Any] = {"pad_token_id": self._named_pad_id(tokenizer)}
        if classifier:
            # A language model is better without one than with EOS: transformers does not train
            # the embedding of the pad id. A classifier finds its last token by it.
            ids["pad_token_id"] = self.pad_token_id(tokenizer)
        eos = list(self.eos_token_ids(tokenizer))
        if eos:
            ids["eos_token_id"] = eos if len(eos) > 1 else eos[0]
        if tokenizer is not None and tokenizer.bos_id is not None:
            ids["bos_token_id"] = tokenizer.bos_id
        family = self.family
        kept = {key: value for key, value in self.config.items() if key not in _STALE}
        entries = kept | family.describe(config) | ids | {"model_type": family.model_type}
        if classifier:
            entries["architectures"] = [family.classifier]
            entries |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        else:
            entries["architectures"] = [family.causal_lm]
            generation = {k: v for k, v in self.generation.items() if k not in _STALE}
            write_json(folder / "generation_config.json", generation | ids)
        write_json(folder / "config.json", entries)

    def _named_pad_id(self, tokenizer: Tokenizer | None) -> int | None:
        told = (*_ids(self.config, "pad_token_id"), *_ids(self.generation, "pad_token_id"))
        if told:
            return told[0]
        return None if tokenizer is None else tokenizer.pad_id


def _ids(entries: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """An entry that is an id, a list of them, or absent (null, or negative in old files)."""
    found = entries.get(key)
    ids = found if isinstance(found, (list, tuple)) else () if found is None else (found,)
    return tuple(int(i) for i in ids if i >= 0)
