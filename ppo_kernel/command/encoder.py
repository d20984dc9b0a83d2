"""Text to the token ids that a policy reads and writes."""

from collections.abc import Sequence
from pathlib import Path

from ..io.folders import existing_folder
from ..io.manifest import Manifest
from ..io.tokenizer import Tokenizer


class Encoder:
    """Prompts, texts and responses as token ids of one policy.

    Args:
        folder: of the policy.

    Raises:
        FileNotFoundError: no such folder, or it has no config.json.
        ValueError: it has no tokenizer, or nothing says what ends a text.
    """

    def __init__(self, folder: Path):
        manifest = Manifest.read(existing_folder(folder))
        self.tokenizer = Tokenizer.load(folder)
        ids, own = manifest.eos_token_ids(self.tokenizer), self.tokenizer.eos_id
        if not ids:
            raise ValueError(
                f"{folder} does not say which token ends a text; add eos_token_id to its "
                "config.json."
            )
        self.eos_id = own if own in ids else ids[0]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Each with what the tokenizer puts in front of a text: BOS, once.

        A prompt from a chat template spells it out already.
        """
        bos = self.tokenizer.bos_id
        rows = self.tokenizer.encode(texts)
        return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in rows]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Each as a prompt, and EOS."""
        return [self._ended(ids) for ids in self.prompts(texts)]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Each as it continues a prompt, and EOS."""
        return [self._ended(ids) for ids in self.tokenizer.encode(texts, add_special_tokens=False)]

    def _ended(self, ids: list[int]) -> list[int]:
        """With EOS, unless the text spells it out."""
        return ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id]
