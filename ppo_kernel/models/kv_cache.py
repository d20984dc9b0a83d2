"""Keys and values of the tokens read so far."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(eqx.Module):
    """One pair of buffers a layer, filled slot by slot; the same slot for every row.

    The slots after the prompt are a ring: the last one is followed by the first of them. A row
    that keeps within the capacity never meets its own tokens there, and attention does not mind
    where in the ring they begin.

    `keys[l]` and `values[l]` are separate arrays, so that a decode step writes each in place.
    `mask` says which slots hold a token, `positions` is the position of each row's next token,
    `slot` the index of the next free slot, `prompt_width` the first one of the ring.
    """

    keys: tuple[Float[Array, "B K S E"], ...]
    values: tuple[Float[Array, "B K S E"], ...]
    mask: Bool[Array, "B S"]
    positions: Int[Array, " B"]
    slot: Int[Array, ""]
    prompt_width: int = eqx.field(static=True)

    @classmethod
    def from_prefill(
        cls,
        keys: Float[Array, "L B P K E"],
        values: Float[Array, "L B P K E"],
        mask: Bool[Array, "B P"],
        capacity: int,
    ) -> "KVCache":
        """The cache after a prompt, with room for `capacity` slots in all.

        Args:
            keys, values: of every layer, rotated already, in the cache's type.
            mask: valid slots of the prompt.
            capacity: S, at least P.

        Raises:
            ValueError: the prompt does not fit.
        """
        layers, _, length = keys.shape[:3]
        if capacity < length:
            raise ValueError(f"a prompt of {length} slots does not fit a cache of {capacity}.")

        def lay_out(x: Float[Array, "B P K E"]) -> Float[Array, "B K S E"]:
            return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, capacity - length), (0, 0)))

        return cls(
            keys=tuple(lay_out(keys[layer]) for layer in range(layers)),
            values=tuple(lay_out(values[layer]) for layer in range(layers)),
            mask=jnp.pad(mask, ((0, 0), (0, capacity - length))),
            positions=jnp.sum(mask, axis=1, dtype=jnp.int32),
            slot=jnp.asarray(length, jnp.int32),
            prompt_width=length,
        )

    def grown(self, capacity: int) -> "KVCache":
        """The cache with room for `capacity` slots, no fewer; where it was full, it goes on there.

        Only before any slot is written a second time.

        Raises:
            ValueError: it has more slots already.
        """
        before = self.mask.shape[1]
        if capacity < before:
            raise ValueError(f"a cache of {before} slots cannot grow to {capacity}.")

        def pad(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, capacity - before if i == axis else 0) for i in range(x.ndim)])

        return replace(
            self,
            keys=tuple(pad(x, 2) for x in self.keys),
            values=tuple(pad(x, 2) for x in self.values),
            mask=pad(self.mask, 1),
            slot=jnp.where(jnp.any(self.mask[:, -1]), before, self.slot),
        )

    def open_slot(self) -> "KVCache":
        """The cache with its next slot marked as holding a token."""
        opened = jnp.ones((self.mask.shape[0], 1), bool)
        mask = jax.lax.dynamic_update_slice_in_dim(self.mask, opened, self.slot, axis=1)
        return replace(self, mask=mask)

    def close_slot(
        self, keys: list[Float[Array, "B K S E"]], values: list[Float[Array, "B K S E"]]
    ) -> "KVCache":
        """The cache after every layer has written its slot."""
        last = self.slot == self.mask.shape[1] - 1
        return replace(
            self, keys=tuple(keys), values=tuple(values), positions=self.positions + 1,
            slot=jnp.where(last, self.prompt_width, self.slot + 1),
        )  # fmt: skip


def write_slot(
    buffer: Float[Array, "B K S E"], entry: Float[Array, "B K E"], slot: Int[Array, ""]
) -> Float[Array, "B K S E"]:
    """`buffer` with `entry` at `slot`; XLA does it in place inside a loop."""
    entry = entry[:, :, None].astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, entry, slot, axis=2)
