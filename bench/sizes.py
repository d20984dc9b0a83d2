"""Named sizes as plain numbers: no JAX here, because the peers' environments read them too."""

from argparse import ArgumentTypeError
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Size:
    """A decoder-only Transformer (gated MLP, biases on query, key and value) and a batch."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool
    batch: int
    prompt: int
    response: int
    epochs: int

    @property
    def matmul_parameters(self) -> int:
        """Weights of all layers that a token is multiplied with, without the output head."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def head_parameters(self) -> int:
        """Weights of the output head, which a tied model shares with its embedding."""
        return self.vocab * self.width

    @property
    def policy_parameters(self) -> int:
        """Every weight of the policy: embedding, layers, norms, biases, output head."""
        biases = self.head_dim * (self.heads + 2 * self.kv_heads)
        small = self.layers * (biases + 2 * self.width) + self.width
        tables = self.head_parameters * (1 if self.tied else 2)
        return self.matmul_parameters + small + tables

    @property
    def critic_parameters(self) -> int:
        """The same trunk, with one weight a channel for a head."""
        tables = self.head_parameters * (1 if self.tied else 2)
        return self.policy_parameters - tables + self.head_parameters + self.width


SIZES = {
    "tiny": Size(512, 128, 4, 4, 2, 32, 512, False, 16, 32, 64, 4),
    "small": Size(32_000, 512, 8, 8, 4, 64, 1408, False, 8, 64, 128, 2),
    "qwen05": Size(151_936, 896, 24, 14, 2, 64, 4864, True, 4, 64, 32, 1),
    "qwen15": Size(151_936, 1536, 28, 12, 2, 128, 8960, True, 4, 64, 32, 1),
}
"""`tiny` has 1.1 M parameters, `small` 56 M, `qwen05` and `qwen15`, the shapes of Qwen2.5-0.5B and
1.5B, 494 M and 1,544 M."""


def parse_size(text: str) -> Size:
    """A size from `tiny`, or from `tiny,batch=8,response=256`: a name, then what to change.

    Raises:
        ValueError: an unknown name or field, or a value that is not a whole number of at least 1
            (`tied`: 0 or 1).
    """
    name, *changes = text.split(",")
    if name.lower() not in SIZES:
        raise ValueError(f"unknown size {name!r}; known: {sorted(SIZES)}.")
    values = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in {field.name for field in fields(Size)}:
            raise ValueError(f"unknown field {key!r} of a size, in {text!r}.")
        allowed = value in ("0", "1") if key == "tied" else value.isdecimal() and int(value) > 0
        if not allowed:
            raise ValueError(f"{change!r} in {text!r} needs a number, as in {key}=1.")
        values[key] = bool(int(value)) if key == "tied" else int(value)
    return replace(SIZES[name.lower()], **values)


def positive(text: str) -> int:
    """A flag that counts something: `type=positive`."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
